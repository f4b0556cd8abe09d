"""How a task tells Prefect what happened: its lines in the run's log, and `Cached` for what was reused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from prefect import get_run_logger
from prefect.client.schemas.objects import State
from prefect.exceptions import MissingContextError
from prefect.states import Completed


def speaker() -> Callable[[str], None]:
    """Where lines for the person who waits go: the task run's log, or the screen outside a run."""
    try:
        logger = get_run_logger()
    except MissingContextError:
        return lambda line: print(line, flush=True)
    return lambda line: logger.info("%s", line)


def outcome(directory: Path, reused: bool) -> Path | State[Path]:
    """A stage's directory, in the state `Cached` when nothing was computed."""
    return Completed(name="Cached", message="reused", data=directory) if reused else directory
