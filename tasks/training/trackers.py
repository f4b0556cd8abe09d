"""Where a training's curves go: TensorBoard by default; W&B, MLflow or Trackio by `report_to` in a run's file.

Each is opened behind the three methods of TensorBoard's writer that metrics.py calls. A resumed training goes on with
the same curves: the stage's directory names the run. Nothing needs a network: W&B writes offline unless WANDB_API_KEY
is set (`wandb sync` sends it later), MLflow into a database in `runs/` unless MLFLOW_TRACKING_URI says otherwise,
Trackio into its own folder. Their packages are installed by whoever wants them.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from tasks.errors import UserError

TENSORBOARD = "tensorboard"
PROJECT = "steep"


class Tracker(Protocol):
    """What a training tells a tracker."""

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """One point of one curve."""

    def flush(self) -> None:
        """What was said so far survives a kill."""

    def close(self) -> None:
        """The end."""


def open_tracker(report_to: str, directory: Path, first_step: int) -> Tracker:
    """The tracker of a stage that goes on after `first_step`. Raises `UserError` when its package is missing."""
    if report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter  # 1 s of import that only rank 0 needs

        return SummaryWriter(str(directory / TENSORBOARD), purge_step=first_step + 1 if first_step else None)
    others: dict[str, Callable[[Path], Tracker]] = {"wandb": _Wandb, "mlflow": _Mlflow, "trackio": _Trackio}
    return others[report_to](directory)


def check_tracker(report_to: str) -> None:
    """Refuse a tracker whose package is missing, before anything is loaded."""
    if report_to != "tensorboard":
        _package(report_to)


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"report_to is '{name}', whose package is not installed: {error}",
            where="the run's file, key report_to",
            allowed="tensorboard, which is installed; or wandb, mlflow, trackio",
            todo=f"pip install {name}",
        ) from None


class _Wandb:
    def __init__(self, directory: Path) -> None:
        wandb = _package("wandb")
        mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
        self.run = wandb.init(project=PROJECT, id=directory.name, name=directory.name, dir=str(directory), mode=mode,
                              resume="allow", save_code=False)  # fmt: skip
        self.line: dict[str, float] = {}
        self.step = 0

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Points of one step are sent together: W&B takes no point behind its last step."""
        if step != self.step:
            self.flush()
        self.step = step
        self.line[name] = value

    def flush(self) -> None:
        """Send the step."""
        if self.line:
            self.run.log(self.line, step=self.step)
        self.line = {}

    def close(self) -> None:
        """Send the rest and end."""
        self.flush()
        self.run.finish()


class _Mlflow(_Wandb):
    def __init__(self, directory: Path) -> None:
        mlflow = _package("mlflow")
        self.metric = mlflow.entities.Metric
        self.line, self.step = {}, 0
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{directory.parent.resolve() / 'mlflow.db'}"
        self.client = mlflow.MlflowClient(tracking_uri=uri)
        found = self.client.get_experiment_by_name(PROJECT)
        experiment = found.experiment_id if found else self.client.create_experiment(PROJECT)
        same = f"attributes.run_name = '{directory.name}'"
        runs = self.client.search_runs([experiment], same, max_results=1)
        self.run_id = (runs or [self.client.create_run(experiment, run_name=directory.name)])[0].info.run_id

    def flush(self) -> None:
        """Send the step in one transaction: point by point a small model trained at a third of its speed."""
        now_ms = int(time.time() * 1000)
        if points := [self.metric(name, value, now_ms, self.step) for name, value in self.line.items()]:
            self.client.log_batch(self.run_id, metrics=points)
        self.line = {}

    def close(self) -> None:
        """Send the rest and mark the run as ended."""
        self.flush()
        self.client.set_terminated(self.run_id)


class _Trackio(_Wandb):
    def __init__(self, directory: Path) -> None:
        trackio = _package("trackio")
        self.run = trackio.init(project=PROJECT, name=directory.name, resume="allow", embed=False)
        self.line, self.step = {}, 0
