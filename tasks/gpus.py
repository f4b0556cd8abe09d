"""One lock a GPU, so that `make pipeline` by hand and a scheduled run do not book the same one twice.

A work pool's limit counts only the runs of that pool. These locks count whatever `steep` starts on the machine. They
are files that the kernel unlocks when the last process that holds them ends: a killed run frees its GPUs, and a worker
that outlives its launcher keeps them. Several GPUs are locked in one order everywhere: nobody waits in a circle.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tasks.errors import UserError
from tasks.holder import read_holder, still_stands

DRIVER = Path("/proc/driver/nvidia/gpus")
VISIBLE = "CUDA_VISIBLE_DEVICES"
POLL_SECONDS = 0.2


def lock_folder() -> Path:
    """Where the locks lie: shared by all users of the machine, as its GPUs are."""
    return Path(os.environ.get("STEEP_GPU_LOCKS") or Path(tempfile.gettempdir()) / "steep-gpus")


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

    Named by their UUID where the driver tells it, so that an index and a UUID in CUDA_VISIBLE_DEVICES mean the same
    lock. Raises `UserError` when fewer are visible than the tag says.
    """
    if how.get("device") != "cuda" or module not in ("tasks.training", "tasks.evaluation"):
        return []
    needed = int(how.get("processes", 1)) if module == "tasks.training" else 1
    uuids = _uuids()
    said = os.environ.get(VISIBLE)
    visible = [part.strip() for part in said.split(",") if part.strip()] if said is not None else None
    if visible is None:
        visible = [str(index) for index in range(max(needed, len(uuids)))]
    if len(visible) < needed:
        raise UserError(
            f"the hardware tag '{how.get('tag', '?')}' uses {needed} GPUs, and {VISIBLE} shows {len(visible)}",
            where=f"{VISIBLE}={said}",
            todo=f"show it {needed}, or choose a tag with fewer",
        )
    return [uuids[int(one)] if one.isdigit() and int(one) < len(uuids) else one for one in visible[:needed]]


def _uuids() -> list[str]:
    """UUIDs of the machine's GPUs by index, as the driver lists them; empty where it does not tell."""
    found = []
    for information in sorted(DRIVER.glob("*/information")):  # by their place on the bus
        with contextlib.suppress(OSError):
            if said := re.search(r"GPU UUID:\s*(\S+)", information.read_text()):
                found.append(said[1])
    return found


@contextmanager
def _locked(gpu: str, holder: str, on_wait: Callable[[str], None], meanwhile: Callable[[], None]) -> Iterator[int]:
    descriptor = _open_locked(gpu, on_wait, meanwhile)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} ({holder}), since {time.strftime('%F %T')}".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def _open_locked(gpu: str, on_wait: Callable[[str], None], meanwhile: Callable[[], None]) -> int:
    path = lock_folder() / f"{re.sub(r'[^A-Za-z0-9-]', '_', gpu)}.lock"
    while True:
        descriptor = _open(path)
        try:
            if not _take(descriptor):
                on_wait(f"waiting: GPU {gpu} is held by {read_holder(descriptor)}")
                while not _take(descriptor):
                    meanwhile()
                    time.sleep(POLL_SECONDS)
            if still_stands(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


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
