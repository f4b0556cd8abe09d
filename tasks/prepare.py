"""The task of `prepare_cpt` and `prepare_sft`: sources to packed rows."""

from __future__ import annotations

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State

from tasks.artifacts import live, show
from tasks.execute import compute
from tasks.outcome import outcome
from tasks.plan import Planned


@task(task_run_name="{planned.stage}", cache_policy=NO_CACHE)
def prepare(planned: Planned, force: str = "") -> Path | State[Path]:
    """Clean, tokenize, mix and pack one training stage's data; the directory that holds `rows.arrow`."""
    with live([planned]) as say:
        reused = compute([planned], "tasks.preparation", say, force)
    show([planned], reused)
    return outcome(planned.directory, reused)
