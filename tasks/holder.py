"""What the locks of stages and GPUs share (tasks/stage.py, tasks/gpus.py): the words that a holder writes into the
file, and whether the file still is the one that others lock."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path


def read_holder(descriptor: int) -> str:
    """Who holds a lock, as its file says; whoever has just taken it gets a moment to write that down."""
    for _ in range(20):
        if said := os.pread(descriptor, 500, 0).decode(errors="replace").strip():
            return said
        time.sleep(0.02)
    return "another process"


def still_stands(descriptor: int, path: Path) -> bool:
    """Whether a file just locked is the one at its path: a cleaner of old files may have removed it after we opened it,
    and then the next one to come makes another, and locks that."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False
