"""Steps that break, on two sharded processes: both decide alike, and the row is named whoever held it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.errors import EXIT_USER_ERROR
from tasks.stage import ERROR, read_artifact
from tasks.training.checkpoint import list_checkpoints, step_of
from tasks.training.metrics import read_metrics
from tests.faults.table import Table
from tests.training.conftest import make_stage, run_worker
from tests.training.test_health import BAD_ROW, SKIP, STOP, poisoned

__all__ = ["poisoned"]
pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]
EVERY_5 = {"checkpoint": {"every_steps": 5, "every_minutes": None, "keep_last": 2}, "processes": 2}


def test_two_processes_skip_the_same_step(table: Table, poisoned: tuple[Path, Path], tmp_path: Path) -> None:
    fault = table.tried("a row whose loss is not finite, `on_nan: skip`", "two processes")
    directory = make_stage(tmp_path, *poisoned, SKIP | EVERY_5)
    assert run_worker(directory, processes=2) == 0, (directory / "worker.log").read_text()[-3000:]
    assert read_artifact(directory)["counts"]["skipped_steps"] == [6]
    assert f"row {BAD_ROW};" in read_metrics(directory)[5]["skipped"]
    fault.survived = True


def test_two_processes_stop_before_the_same_step(table: Table, poisoned: tuple[Path, Path], tmp_path: Path) -> None:
    fault = table.tried("a row whose loss is not finite", "two processes")
    directory = make_stage(tmp_path, *poisoned, STOP | EVERY_5)
    assert run_worker(directory, processes=2) in (1, EXIT_USER_ERROR)  # torchrun turns every code into 1
    assert f"row {BAD_ROW} of" in (directory / ERROR).read_text()
    assert step_of(list_checkpoints(directory)[0]) == 5
    fault.survived = True
