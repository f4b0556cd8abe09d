"""What the locks of stages and GPUs share (tasks/stage.py, tasks/gpus.py): how one is taken, and the words that a
holder writes into its file."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


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
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


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
