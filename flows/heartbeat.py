"""The thread that sends a flow's heartbeats ends with the flow.

Prefect's thread sleeps a second at a time, and the end of a flow waits for it: half a second of every run, on average.
It must be waited for: one that was still there when the interpreter ended crashed it in 4 of 100 runs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

from prefect import flow_engine

SECONDS_BETWEEN_LOOKS = 0.01
_send_heartbeats = flow_engine._send_heartbeats
_over: ContextVar[threading.Event | None] = ContextVar("over", default=None)  # the thread has a copy of its flow's


@contextmanager
def _heartbeats_that_wake(*args: Any, **kwargs: Any) -> Iterator[None]:
    outer, over = _over.get(), threading.Event()
    _over.set(over)
    with _send_heartbeats(*args, **kwargs):
        _over.set(outer)
        try:
            yield
        finally:
            over.set()


def _sleep(seconds: float) -> None:
    over = _over.get()
    if over is None:
        time.sleep(seconds)
    elif over.wait(seconds):  # Prefect's own flag follows at once
        time.sleep(SECONDS_BETWEEN_LOOKS)


def wake_heartbeats() -> None:
    """From now on the end of a flow wakes the thread that it waits for."""
    flow_engine.time = SimpleNamespace(**vars(time) | {"sleep": _sleep})  # type: ignore[attr-defined, assignment]
    flow_engine._send_heartbeats = _heartbeats_that_wake
