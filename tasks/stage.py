"""What a stage is: a directory `runs/<stage>-<key>/` that goes from an order to an artifact.

    order.json     what to compute, fully resolved; written first
    worker.log, metrics, checkpoints, outputs
    artifact.json  what came out: outputs with digests, counts, seconds, versions; written last, by atomic rename

The key hashes `what` is computed; `how` (hardware, micro-batch, cadence of checkpoints) is recorded and never hashed.
Done means that `artifact.json` exists and its digests hold. Resuming means the same directory. Forcing renames the old
directory aside. A lock that the kernel frees when its holders die keeps two runs out of one stage.

Used by the orchestrator and by the workers, so it imports neither Prefect nor torch.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from tasks.errors import UserError
from tasks.holder import open_locked, read_holder, write_holder
from tasks.provenance import git_commit, installed_versions

# Bumped when a worker's output changes for the same order; part of every key.
VERSIONS = {"prepare": 2, "train": 1, "evaluate": 2, "report": 2}
ORDER, ARTIFACT, LOG = "order.json", "artifact.json", "worker.log"
ERROR, PREEMPTED = "error.txt", "preempted.txt"  # what a worker that did not finish left to say
OOM = "oom.json"  # of a worker that ran out of memory: measured_gib, predicted_gib, microbatch_rows, step
KEY_HEX_DIGITS = 10
LOCK_FD_VARIABLE = "STEEP_LOCK_FD"  # set for a worker whose launcher holds the stage's lock
MEETING_VARIABLE = "STEEP_MEETING"  # a folder of the launcher's, in which the processes of one node meet


@dataclass(frozen=True)
class Order:
    """What a worker is asked to do. `stage` is the folder's first name: prepare_cpt, cpt, evaluate_base, ..."""

    stage: str
    kind: str  # prepare | train | evaluate | report
    run: str  # the run's name; not hashed
    what: dict[str, Any]  # hashed: what is computed
    how: dict[str, Any]  # recorded: where and how it runs
    inputs: dict[str, str] = field(default_factory=dict)  # role -> path; their keys or digests stand in `what`

    @property
    def key(self) -> str:
        """Hash of everything that defines the output."""
        return self.key_of(VERSIONS[self.kind])

    def key_of(self, version: int) -> str:
        """The key that it had with a version of its worker."""
        identity = {"kind": self.kind, "version": version, "what": self.what}
        return hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:KEY_HEX_DIGITS]

    def directory(self, runs: Path) -> Path:
        """Where this stage stands."""
        return runs / f"{self.stage}-{self.key}"


def canonical_json(value: Any) -> str:
    """JSON with sorted keys: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def write_json(path: Path, value: Any) -> None:
    """Write aside and rename, so that nobody ever reads half a file."""
    write_text(path, json.dumps(value, indent=2, sort_keys=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write aside, flush to disk and rename."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:  # a full disk, a signal: half a file helps nobody
        aside.unlink(missing_ok=True)
        raise


def write_order(order: Order, runs: Path) -> Path:
    """Make the stage's directory with its order; an order that stands keeps its inputs and gets the new `how`."""
    directory = order.directory(runs)
    put_order(order, directory)
    return directory


def put_order(order: Order, directory: Path) -> None:
    """Write the order into a directory, which is made if need be."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / ORDER, {**asdict(order), "key": order.key, "version": VERSIONS[order.kind]})


def read_order(directory: Path) -> Order:
    """The order of a stage's directory. Raises `UserError` where there is none, or a damaged one."""
    if not (directory / ORDER).exists():
        raise UserError(f"{directory} is no stage's directory: it holds no {ORDER}")
    if order := read_sound_order(directory):
        return order
    raise UserError(f"{directory / ORDER} is unreadable, or not what its key says",
                    todo=f"move {directory} aside and run again")  # fmt: skip


def read_sound_order(directory: Path) -> Order | None:
    """The order; None when it is gone, or is not the one that was written: its key tells."""
    raw = read_json(directory / ORDER)
    try:
        order = Order(**{one.name: raw[one.name] for one in fields(Order)})
        sound = order.kind in VERSIONS and raw["key"] == order.key_of(raw["version"])
        sound = sound and all(isinstance(value, dict) for value in (order.what, order.how, order.inputs))
        sound = sound and all(isinstance(text, str) for text in (order.stage, order.run, *order.inputs.values()))
    except (LookupError, TypeError):
        return None
    return order if sound else None


def leave_error(directory: Path, error: UserError) -> None:
    """What a worker says that ends for a mistake in the input, in `error.txt` and its log, if the disk takes it."""
    with suppress(OSError):
        write_text(directory / ERROR, error.render() + "\n")
    with suppress(OSError):
        print(error.render(), flush=True)


# --- artifact -------------------------------------------------------------------------------------------------------


def finish(directory: Path, outputs: Iterable[str], counts: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Write `artifact.json`: the stage is done from the moment of its rename.

    `outputs` are files or folders, relative to the directory; every file below them is digested.
    """
    order = read_order(directory)
    sweep(directory)
    files = sorted(file for output in outputs for file in _files_below(directory / output))
    sync(files, directory)  # what they came from, a training's checkpoints, is deleted as soon as the artifact stands
    artifact = {
        "stage": order.stage,
        "key": order.key,
        "run": order.run,
        "seconds": round(seconds, 3),
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": git_commit(),
        "python": sys.version.split()[0],
        "versions": installed_versions(),
        "how": order.how,
        "outputs": {str(f.relative_to(directory)): describe_file(f) for f in files},
        "counts": counts,
    }
    write_json(directory / ARTIFACT, artifact)
    sync([], directory)
    return artifact


def sweep(directory: Path) -> None:
    """Remove what killed runs were writing: in a stage's directory, names with a dot before them. Under its lock."""
    for path in directory.glob(".*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def read_artifact(directory: Path) -> dict[str, Any]:
    """The artifact of a stage that is done."""
    artifact: dict[str, Any] = json.loads((directory / ARTIFACT).read_text())
    return artifact


def is_done(directory: Path) -> bool:
    """Whether the artifact stands and its outputs are what it says."""
    return (directory / ARTIFACT).is_file() and not damage(directory)


def read_json(path: Path) -> Any:
    """A JSON file's content; None when it is gone, or is none (a disk that rots spares nothing)."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def read_sound_artifact(directory: Path) -> dict[str, Any] | None:
    """The artifact; None when it is gone, or a bit that flipped took one of its fields away."""
    artifact = read_json(directory / ARTIFACT)
    try:
        sound = isinstance(artifact["how"], dict) and isinstance(artifact["counts"], dict)
        for said in artifact["outputs"].values():
            sound = sound and isinstance(said["sha256"], str)
            sound = sound and isinstance(said["bytes"], int) and isinstance(said["mtime_ns"], int)
    except (LookupError, TypeError, AttributeError):
        return None
    return artifact if sound else None


def damage(directory: Path) -> str:
    """Empty when its order can be read and every output is as its artifact says; else the first file that is not.

    A file whose size and time of change are as recorded is taken as unchanged; any other is digested again.
    """
    if not (artifact := read_sound_artifact(directory)):
        return f"{ARTIFACT} is unreadable"
    if not read_sound_order(directory):
        return f"{ORDER} is unreadable, or not what its key says"
    for name, said in artifact["outputs"].items():
        try:
            if found := _difference(directory / name, said):
                return f"{name} {found}"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return ""


def _difference(file: Path, said: dict[str, Any]) -> str:
    if not file.is_file():
        return "is missing"
    stat = file.stat()
    if stat.st_size != said["bytes"]:
        return f"holds {stat.st_size} bytes, not {said['bytes']}"
    if stat.st_mtime_ns != said["mtime_ns"] and file_sha256(file) != said["sha256"]:
        return "has changed since it was written"
    return ""


def describe_file(path: Path) -> dict[str, Any]:
    """Size, time of change and digest of a file."""
    stat = path.stat()
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": file_sha256(path)}


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(files: Iterable[Path], directory: Path) -> None:
    """Let files, and their names in the folders up to the stage's, survive a power cut."""
    folders = {directory}
    for file in files:
        folders.update(folder for folder in file.parents if folder.is_relative_to(directory))
        _sync_one(file)
    for folder in folders:
        with suppress(OSError):  # some network file systems sync no folder
            _sync_one(folder)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files_below(path: Path) -> list[Path]:
    return [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]


# --- force, lock ----------------------------------------------------------------------------------------------------


def set_aside(directory: Path) -> Path | None:
    """Rename a stage's directory aside; what was computed is never deleted."""
    if not directory.exists():
        return None
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    for number in range(1000):
        aside = directory.with_name(f"old.{directory.name}.{stamp}" + (f".{number}" if number else ""))
        if not aside.exists():
            directory.rename(aside)
            return aside
    raise AssertionError("a thousand directories set aside within a second")


@contextmanager
def stage_lock(directory: Path, on_wait: Callable[[str], None], wait: bool = True) -> Iterator[int]:
    """Hold a stage's lock; yields the descriptor, which a child that inherits it holds too.

    The lock goes with the last process that holds the descriptor, so a SIGKILLed run frees it at once, and a worker
    that outlives its launcher still keeps others out. `on_wait` is told once who holds it.
    """
    if inherited := os.environ.get(LOCK_FD_VARIABLE):  # our launcher holds it for us
        yield int(inherited)
        return
    path = directory.parent / ".locks" / f"{directory.name}.lock"
    descriptor = open_locked(path, _open_lock, lambda opened: _acquire(opened, directory, on_wait, wait))
    try:
        write_holder(descriptor)
        yield descriptor
    finally:
        os.close(descriptor)


def _open_lock(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _acquire(descriptor: int, directory: Path, on_wait: Callable[[str], None], wait: bool) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    except BlockingIOError:
        holder = read_holder(descriptor)
    if not wait:
        raise UserError(f"{directory.name} is being computed by {holder}", todo="wait for it, or stop it")
    on_wait(holder)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
