"""What the locks of stages and GPUs share (tasks/stage.py, tasks/gpus.py): how one is taken, and the words that a
holder writes into its file."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tasks.errors import UserError

NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # of a mount that was told to have none, or cannot


def open_locked(path: Path, open_file: Callable[[Path], int], lock: Callable[[int], None]) -> int:
    """A descriptor of the file at `path` with its lock held; `lock` waits for it, or raises.

    A cleaner of old files may remove the file while we wait: then the next one to come makes another and locks that, so
    we begin again with the one that stands now. What this cannot see is a removal under a living holder, who has no
    reason to look again: the next one to come gets in beside it. A second lock to close that would need a second place,
    on a file or folder that a cleaner finds as well, or a name of the kernel's (an abstract socket) that other machines
    and containers do not share. So the files lie where no cleaner goes: those of stages in the runs folder, those of
    GPUs in /run/lock where the machine has it.
    """
    while True:
        descriptor = open_file(path)
        try:
            lock(descriptor)
            if _still_stands(descriptor, path):
                return descriptor
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, OSError) and error.errno in NO_LOCKS:
                raise UserError(
                    f"the file system of {path.parent} gives no locks (flock: {error.strerror}), which keep two runs "
                    "from computing the same at once",
                    where=str(path),
                    allowed="a local disk, NFS with its lock service, Lustre mounted with -o flock",
                    todo="name a folder on one: runs_dir for stages, STEEP_GPU_LOCKS for GPUs",
                ) from None
            raise
        os.close(descriptor)


def write_holder(descriptor: int, doing: str = "") -> None:
    """Say in a lock's file who holds it: the file may lie where other machines see it too."""
    who = f"process {os.getpid()} on {os.uname().nodename}" + (f" ({doing})" if doing else "")
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{who}, since {time.strftime('%F %T')}".encode(), 0)


def read_holder(descriptor: int) -> str:
    """Who holds a lock, as its file says; whoever has just taken it gets a moment to write that down."""
    for _ in range(20):
        if said := os.pread(descriptor, 500, 0).decode(errors="replace").strip():
            return said
        time.sleep(0.02)
    return "another process"


def _still_stands(descriptor: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False
