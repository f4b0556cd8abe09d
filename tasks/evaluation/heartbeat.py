"""A sign of life while nothing can be counted: imports, loading a model, reading a task's data."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tasks.progress import clock, say

SECONDS_BETWEEN_LINES = 3.0


@contextmanager
def heartbeat(stage: str, what: str, seconds_between_lines: float = SECONDS_BETWEEN_LINES) -> Iterator[None]:
    """Say `what` now, and again with the time spent as long as the block runs."""
    started_at, stop = time.monotonic(), threading.Event()

    def beat() -> None:
        while not stop.wait(seconds_between_lines):
            say(f"{stage:<14}{what}  {clock(time.monotonic() - started_at)}")

    say(f"{stage:<14}{what}")
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
