"""The task of `report`: everything that the stages left behind, as one table and one page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State

from tasks.artifacts import live, show
from tasks.execute import compute
from tasks.outcome import outcome
from tasks.plan import Planned


@task(task_run_name="report", cache_policy=NO_CACHE)
def report(planned: Planned, *stages: Any, force: str = "") -> Path | State[Path]:
    """Write results.csv, report.md and report.html; the directory that holds them."""
    with live([planned]) as say:
        reused = compute([planned], "tasks.reporting", say, force)
    show([planned], reused)
    return outcome(planned.directory, reused)
