"""SIGTERM and SIGINT: during training a wish to stop after this step, at any other time an end at once.

Either way the process exits with 75 (`EXIT_PREEMPTED`), and running the same directory again goes on where
it stopped.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_state = {"asked": False, "training": False}


class Preempted(BaseException):
    """Raised where nothing can be lost by stopping at once; no `except Exception` of a library catches it."""


def listen() -> None:
    """Take over the signals."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _handle)


def preempted() -> bool:
    """Whether someone asked us to stop."""
    return _state["asked"]


@contextmanager
def finishing_steps() -> Iterator[None]:
    """Within, a signal waits for the step's end (and for a save in progress); it takes effect on leaving."""
    _state["training"] = True
    try:
        yield
    finally:
        _state["training"] = False
    if preempted():
        raise Preempted


def _handle(number: int, frame: Any) -> None:
    first, _state["asked"] = not _state["asked"], True
    if first and not _state["training"]:  # a second signal must not disturb the way out
        raise Preempted
