"""How a task tells Prefect what happened: its lines in the run's log, and `Cached` for what was reused."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from prefect import get_run_logger
from prefect.client.schemas.objects import State
from prefect.exceptions import MissingContextError
from prefect.states import Completed


class Say(Protocol):
    """Takes a line for the person who waits; one that is not `kept` is for the screen of this moment alone."""

    def __call__(self, line: str, kept: bool = True) -> None:
        """Say it."""


def speaker() -> Say:
    """Where lines for the person who waits go: the task run's log, or the screen outside a run."""
    try:
        logger = get_run_logger()
    except MissingContextError:
        return lambda line, kept=True: print(line, flush=True)
    return lambda line, kept=True: logger.info("%s", line, extra={"send_to_api": kept})


def outcome(directory: Path, reused: bool) -> Path | State[Path]:
    """A stage's directory, in the state `Cached` when nothing was computed."""
    return Completed(name="Cached", message="reused", data=directory) if reused else directory
