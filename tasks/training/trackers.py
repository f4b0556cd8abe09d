"""Where a training's curves go: TensorBoard by default; W&B, MLflow or Trackio by `report_to` in a run's file.

Each is opened behind the three methods of TensorBoard's writer that metrics.py calls. The stage's directory names the
run, and a resumed training goes on with its curves: each tracker says up to which step it holds them, metrics.py tells
it the rest from `metrics.jsonl`. Nothing needs a network: W&B writes offline unless WANDB_API_KEY is set (`wandb sync`
sends it later), MLflow into a database in `runs/` unless MLFLOW_TRACKING_URI says otherwise, Trackio into its own
folder. Their packages are installed by whoever wants them.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from tasks.errors import UserError
from tasks.stage import read_order

TENSORBOARD = "tensorboard"
PROJECT = "steep"
INSTALL = {"wandb": "wandb", "mlflow": "mlflow-skinny", "trackio": "trackio"}  # all of MLflow would replace our PyArrow
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # it and W&B call home, offline too; the DO_NOT_TRACK=1 of others is not heard
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # a step waits for a server that is away; by default for four minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


class Tracker(Protocol):
    """What a training tells a tracker."""

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """One point of one curve."""

    def flush(self) -> None:
        """What was said so far survives a kill."""

    def close(self) -> None:
        """The end."""


def open_tracker(report_to: str, directory: Path, first_step: int) -> tuple[Tracker, int]:
    """The tracker of a stage that goes on after `first_step`, and the last step that it holds.

    Raises `UserError` when its package is missing.
    """
    if report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter  # 1 s of import that only rank 0 needs

        board = SummaryWriter(str(directory / TENSORBOARD), purge_step=first_step + 1 if first_step else None)
        return board, first_step
    tracker = {"wandb": _Wandb, "mlflow": _Mlflow, "trackio": _Trackio}[report_to](directory, first_step)
    return tracker, tracker.held


def missing_tracker(report_to: str) -> UserError | None:
    """What is missing here for a tracker, found without loading it: the plan asks before anything is prepared."""
    if report_to == "tensorboard":
        return None
    spec = importlib.util.find_spec(report_to)
    is_package = spec and spec.origin  # without origin it is a folder of that name where we stand, as W&B makes one
    return None if is_package else _not_installed(report_to)


def check_tracker(report_to: str) -> None:
    """Refuse a tracker whose package does not load, or that would tell a password, before anything else is loaded."""
    if report_to == "wandb" and "@" in os.environ.get("WANDB_BASE_URL", ""):
        raise UserError(
            "WANDB_BASE_URL holds a user or a password, and W&B writes that address into worker.log",
            where="the environment",
            allowed="an address alone, as https://wandb.example.org",
            todo="take everything up to the @ out of it; the key goes into WANDB_API_KEY",
        )
    if report_to != "tensorboard":
        _package(report_to)


def _package(name: str) -> Any:
    for variable, value in ENVIRONMENT.items():  # read at the import, or later
        os.environ.setdefault(variable, value)
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise _not_installed(name, f": {error}") from None


def _not_installed(name: str, why: str = "") -> UserError:
    return UserError(
        f"report_to is '{name}', whose package is not installed{why}",
        where="the run's file, key report_to",
        allowed="tensorboard, which is installed; or wandb, mlflow, trackio",
        todo=f".venv/bin/pip install {INSTALL[name]}",
    )


class _Wandb:
    def __init__(self, directory: Path, first_step: int) -> None:
        wandb = _package("wandb")
        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        # No git: the address of a remote may hold a token. No console: it is in worker.log.
        settings = wandb.Settings(disable_git=True, console="off", init_timeout=20)
        # One that starts again replaces the run of its name.
        self.run = wandb.init(project=PROJECT, id=directory.name, name=directory.name, dir=str(directory), mode=mode,
                              resume="allow" if first_step else None, config=read_order(directory).what,
                              save_code=False, settings=settings)  # fmt: skip
        self.line: dict[str, float] = {}
        self.step, self.held = 0, max(0, self.run.step - 1)
        if mode == "offline":  # a folder a process: this one gets all steps, so that one `wandb sync` sends each once
            for folder in (directory / "wandb").glob("offline-run-*"):
                if folder != Path(self.run.dir).parent:
                    shutil.rmtree(folder)

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
    def __init__(self, directory: Path, first_step: int) -> None:
        mlflow = _package("mlflow")
        self.metric = mlflow.entities.Metric
        self.line, self.step, self.held = {}, 0, 0
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{directory.parent.resolve() / 'mlflow.db'}"
        self.client = mlflow.MlflowClient(tracking_uri=uri)
        found = self.client.get_experiment_by_name(PROJECT)
        experiment = found.experiment_id if found else self.client.create_experiment(PROJECT)
        same = f"attributes.run_name = '{directory.name}'"
        earlier = self.client.search_runs([experiment], same, max_results=1)  # the newest
        if earlier and first_step:
            self.run_id = earlier[0].info.run_id
            points = self.client.get_metric_history(self.run_id, "lr")  # every step has one
            self.held = max((point.step for point in points), default=0)
            return
        for run in earlier:
            if run.info.status == "RUNNING":  # killed before its first checkpoint
                self.client.set_terminated(run.info.run_id, "KILLED")
        self.run_id = self.client.create_run(experiment, run_name=directory.name).info.run_id
        params = [mlflow.entities.Param(name, str(value)) for name, value in read_order(directory).what.items()]
        self.client.log_batch(self.run_id, params=params)

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
    def __init__(self, directory: Path, first_step: int) -> None:
        trackio = _package("trackio")
        # It writes twice a second and cannot be asked to: a kill takes steps from before the checkpoint too. So the run
        # of that name is replaced by one that is told all.
        with suppress(ValueError):  # it has no such project yet
            for run in trackio.Api().runs(PROJECT):
                if run.name == directory.name:
                    run.delete()
        what = read_order(directory).what
        self.run = trackio.init(project=PROJECT, name=directory.name, config=what, resume="never", embed=False)
        self.line, self.step, self.held = {}, 0, 0
