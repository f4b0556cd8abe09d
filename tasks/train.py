"""The task of `cpt` and `sft`: packed rows and an initial model to a trained model."""

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


@task(task_run_name="{planned.stage}", cache_policy=NO_CACHE)
def train(planned: Planned, *inputs: Any, force: str = "") -> Path | State[Path]:
    """Full fine-tune on the backend of the hardware tag; the directory that holds `model/`.

    `inputs` are the stages it reads from: Prefect draws its graph from them.
    """
    with live([planned]) as say:
        reused = compute([planned], "tasks.training", say, force)
    show([planned], reused)
    return outcome(planned.directory, reused)
