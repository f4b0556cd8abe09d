"""A disk that takes no more: what the system and the libraries say about it, as one of our errors.

Safetensors, torch and Arrow each have an exception of their own for a failed write, with the system's words in it at
best.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tasks.errors import UserError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
SAID_WHEN_FULL = ("No space left on device", "os error 28", "errno 28", "Disk quota exceeded", "File too large",
                  "PytorchStreamWriter failed writing", "unexpected pos")  # fmt: skip
PROBE_BYTES = 64 * 1024


class Refused(UserError):
    """A write that a disk refused, told once: by whoever knows what was written, and where."""


@contextlib.contextmanager
def writes_told(directory: Path) -> Iterator[None]:
    """Within, a write that the disk refuses becomes a `UserError` that says so, also where it passed for bad input."""
    try:
        yield
    except Exception as error:
        if told := refusal(error, directory):
            raise told from error
        raise


def refusal(error: BaseException | None, directory: Path, setting: str = "runs_dir") -> Refused | None:
    """The error to show when a failure came from the disk; None for any other, and for one that is told already.

    `setting` is what moves the directory to another disk.
    """
    while error is not None and not isinstance(error, Refused):
        number = error.errno if isinstance(error, OSError) else None
        name = getattr(error, "filename", None)
        if number in FULL or any(said in str(error) for said in SAID_WHEN_FULL):
            elsewhere = isinstance(name, str | os.PathLike) and not _is_below(name, directory)
            return full(Path(name).parent, "") if elsewhere else full(directory, setting)  # type: ignore[arg-type]
        if number in READ_ONLY and _is_below(name, directory):
            return read_only(directory, os.strerror(number or 0), setting)
        error = error.__cause__ or error.__context__
    return None


def probe(directory: Path) -> UserError | None:
    """Whether a small file can be written there: for a worker that could not even write down why it ended."""
    path = directory / f".probe.{os.getpid()}"
    try:
        path.write_bytes(bytes(PROBE_BYTES))
    except OSError as error:
        return refusal(error, directory)
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    return None


def full(directory: Path, setting: str = "runs_dir") -> Refused:
    """The disk is full."""
    free = free_bytes(directory)
    return Refused(
        f"the disk is full: a write below {directory} was refused, {free / 1e6:,.1f} MB are free",
        where=str(directory),
        todo="free some space" + (f", or set {setting} to another disk" if setting else " there")
        + "; then run the same command again, which goes on",
    )  # fmt: skip


def read_only(directory: Path, said: str, setting: str) -> Refused:
    """We may not write there."""
    return Refused(
        f"nothing can be written below {directory}: {said}",
        where=str(directory),
        todo=f"make it writable for this user, or set {setting} to another folder; then run the same command again",
    )


def _is_below(name: object, directory: Path) -> bool:
    runs = directory.parent.resolve()
    return isinstance(name, str | os.PathLike) and runs in (path := Path(name).resolve(), *path.parents)


def free_bytes(path: Path) -> int:
    """Free disk at a path that may not exist yet."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
