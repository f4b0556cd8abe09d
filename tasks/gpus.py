"""One lock a GPU, so that `make pipeline` by hand and a scheduled run do not book the same one twice.

A work pool's limit counts only the runs of that pool. These locks count whatever `steep` starts on the machine. They
are files that the kernel unlocks when the last process that holds them ends: a killed run frees its GPUs, and a worker
that outlives its launcher keeps them. Several GPUs are locked in one order everywhere: nobody waits in a circle. A
slice of a card (MIG) has memory and units of its own, and a lock of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tasks.errors import UserError
from tasks.holder import open_locked, read_holder, write_holder

LIST = ["nvidia-smi", "-L"]
TIMEOUT_SECONDS = 30
DRIVER_NOT_LOADED = 9  # nvidia-smi(1), return value
LOCKS = Path("/run/lock")
VISIBLE = "CUDA_VISIBLE_DEVICES"
POLL_SECONDS = 0.2


def lock_folder() -> Path:
    """Where the locks lie: shared by all users of the machine, as its GPUs are, and where no cleaner goes if it can be.

    Every user must come to the same answer, so the mode of /run/lock decides, and not whether we may write there.
    Containers that share GPUs but not this folder need one that they share: STEEP_GPU_LOCKS.
    """
    if named := os.environ.get("STEEP_GPU_LOCKS"):
        return Path(named)
    for_all = LOCKS.is_dir() and LOCKS.stat().st_mode & 0o1777 == 0o1777
    for_all = for_all and not os.statvfs(LOCKS).f_flag & os.ST_RDONLY  # as in containers without a disk of their own
    return (LOCKS if for_all else Path(tempfile.gettempdir())) / "steep-gpus"


@contextmanager
def booked(
    module: str,
    how: dict[str, Any],
    holder: str,
    on_wait: Callable[[str], None],
    meanwhile: Callable[[], None] = lambda: None,
) -> Iterator[list[int]]:
    """Hold the locks of the GPUs that a worker of `module` uses; yields their descriptors, for it to inherit.

    `holder` is what others read who wait. `on_wait` is told, once a GPU and holder, which one is awaited and
    who holds it. `meanwhile` is called again and again while one is awaited; what it raises ends the waiting.
    """
    with contextlib.ExitStack() as locks:
        yield [locks.enter_context(_locked(name, holder, on_wait, meanwhile)) for name in sorted(gpus_of(module, how))]


def gpus_of(module: str, how: dict[str, Any]) -> list[str]:
    """The GPUs that a worker will use: as many as the tag says for training, the first for evaluation.

    Named by their whole UUID where the driver tells it, so that an index, a UUID and its first letters in
    CUDA_VISIBLE_DEVICES mean the same lock. Raises `UserError` when fewer are visible than the tag says.
    """
    if how.get("device") != "cuda" or module not in ("tasks.training", "tasks.evaluation"):
        return []
    needed = int(how.get("processes", 1)) if module == "tasks.training" else 1
    said = os.environ.get(VISIBLE)
    visible = _visible(said, listed(), needed)
    if len(visible) < needed:
        raise UserError(
            f"the hardware tag '{how.get('tag', '?')}' uses {needed} GPUs, and {VISIBLE} shows {len(visible)}",
            where=f"{VISIBLE}={said}",
            todo=f"show it {needed}, or choose a tag with fewer",
        )
    return visible[:needed]


def _visible(said: str | None, cards: list[list[str]], needed: int) -> list[str]:
    """The UUIDs that CUDA_VISIBLE_DEVICES names, as CUDA reads it: up to the first that is not there."""
    if said is None:
        return [card[-1] for card in cards] or [str(index) for index in range(needed)]
    names = [name.strip() for name in said.split(",") if name.strip()]
    if not cards:
        return names
    found = (_resolve(name, cards) for name in names)
    return list(itertools.takewhile(bool, found))


def _resolve(name: str, cards: list[list[str]]) -> str:
    """The UUID of an index, of a UUID or of one's first letters; empty for what is not there."""
    if name.isdigit():
        return cards[int(name)][-1] if int(name) < len(cards) else ""
    if name.startswith("MIG-GPU-"):  # an older driver's: MIG-GPU-<the card's UUID>/<instance>/<instance>
        return name if any(name.startswith(f"MIG-{uuid}/") for uuid, *_ in cards) else ""
    matching = [uuid for card in cards for uuid in card if uuid.startswith(name)]
    return matching[0] if len(matching) == 1 else ""


def listed() -> list[list[str]]:
    """The cards that this process can reach, in CUDA's order. Each is its UUID, and those of its slices behind it, the
    one last that CUDA takes for the card: its first.

    nvidia-smi knows of control groups: a job that Slurm gave the third card sees it as index 0, as CUDA does, while
    /proc/driver/nvidia lists the whole machine. Empty where there is no nvidia-smi or no driver. Raises `UserError`
    where it fails otherwise: by another name for the same GPU, two runs would each hold a lock of their own.
    """
    try:
        done = subprocess.run(LIST, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    except FileNotFoundError:
        return []
    except (OSError, subprocess.SubprocessError) as error:
        raise _unknown(str(error)) from None
    if done.returncode == DRIVER_NOT_LOADED:
        return []
    if done.returncode:
        raise _unknown((done.stdout + done.stderr).strip() or f"exit code {done.returncode}")
    said = done.stdout
    cards: list[list[str]] = []
    for is_slice, uuid in re.findall(r"^( *)(?:GPU|MIG).*\(UUID: *([^)\s]+)\)", said, re.M):
        if not is_slice:
            cards.append([uuid])
        elif cards:
            cards[-1].insert(1, uuid)
    return cards


def _unknown(said: str) -> UserError:
    what = f"`{' '.join(LIST)}` fails, so which GPUs these are is not known: {said[:300]}"
    return UserError(what, where="nvidia-smi",
                     todo="look at the driver, and start it again when nvidia-smi answers")  # fmt: skip


@contextmanager
def _locked(gpu: str, holder: str, on_wait: Callable[[str], None], meanwhile: Callable[[], None]) -> Iterator[int]:
    path = lock_folder() / f"{re.sub(r'[^A-Za-z0-9-]', '_', gpu)}.lock"
    descriptor = open_locked(path, _open, lambda opened: _wait_for(opened, gpu, on_wait, meanwhile))
    try:
        write_holder(descriptor, holder)
        yield descriptor
    finally:
        os.close(descriptor)


def _wait_for(descriptor: int, gpu: str, on_wait: Callable[[str], None], meanwhile: Callable[[], None]) -> None:
    if _take(descriptor):
        return
    on_wait(f"waiting: GPU {gpu} is held by {read_holder(descriptor)}")
    while not _take(descriptor):
        meanwhile()
        time.sleep(POLL_SECONDS)


def _take(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _open(path: Path) -> int:
    """A lock file that every user may hold. One that stands is not created again: a sticky folder forbids that."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.parent.chmod(0o1777)
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, flags)
        descriptor = os.open(path, flags | os.O_CREAT, 0o666)
        with contextlib.suppress(PermissionError):
            os.fchmod(descriptor, 0o666)
        return descriptor
    except OSError as error:
        raise UserError(
            f"the lock of a GPU cannot be opened: {error.strerror}",
            where=str(path),
            todo="make it writable for us, or name another folder for all who share the GPUs: STEEP_GPU_LOCKS=...",
        ) from None
