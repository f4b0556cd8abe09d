"""Who holds a lock: the words that its holder writes into the file (tasks/stage.py, tasks/gpus.py)."""

from __future__ import annotations

import os
import time


def read_holder(descriptor: int) -> str:
    """Who holds a lock, as its file says; whoever has just taken it gets a moment to write that down."""
    for _ in range(20):
        if said := os.pread(descriptor, 500, 0).decode(errors="replace").strip():
            return said
        time.sleep(0.02)
    return "another process"
