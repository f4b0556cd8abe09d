"""The task of `evaluate_base`, `evaluate_cpt` and `evaluate_sft`: models to metrics on the same lm-eval tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State

from tasks.artifacts import live, show
from tasks.execute import compute
from tasks.outcome import outcome
from tasks.plan import Planned


@task(task_run_name="evaluate", cache_policy=NO_CACHE)
def evaluate(planned: Sequence[Planned], *models: Any, force: str = "") -> Path | State[Path]:
    """Evaluate every model that is not evaluated yet, in one process: importing lm-eval costs more than a small model.

    Returns the last model's directory, which holds `results.json`.
    """
    with live(planned) as say:
        reused = compute(planned, "tasks.evaluation", say, force)
    show(planned, reused)
    return outcome(planned[-1].directory, reused)
