"""`metrics.jsonl` after a power cut, and beside a tracker that fails."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tasks.errors import UserError
from tasks.training import metrics
from tasks.training.metrics import METRICS, MetricsLog, read_metrics, steps_logged
from tasks.training.trackers import INSTALL, TENSORBOARD


def line(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 2.0, "lr": 1e-5, "grad_norm": 1.0, "tokens_per_second": 9.0, "loss_by_source": {}}


def test_the_lines_are_on_the_disk_before_a_checkpoint_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    log = MetricsLog(tmp_path, 0)
    log.write(line(1))
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    log.flush()
    assert synced == [(tmp_path / METRICS).stat().st_ino]
    log.close()


def test_a_checkpoint_gets_the_lines_that_were_written(tmp_path: Path) -> None:
    """Also where the disk has changed them, or somebody deleted the folder while it was computed."""
    stage, saved = tmp_path / "stage", tmp_path / "saved"
    stage.mkdir(), saved.mkdir()
    log = MetricsLog(stage, 0)
    for step in (1, 2):
        log.write(line(step))
    stage.rename(tmp_path / "gone")  # a deletion would race with TensorBoard's writer
    log.write(line(3))
    log.save(saved)
    assert read_metrics(saved) == [line(1), line(2), line(3)]


@pytest.mark.parametrize("end", [b"\0" * 40, b"\0" * 40 + b"\n", b'{"step": 3, "lo', b'{"step"\xff: 3}\n', b"7\n"])
def test_what_a_power_cut_left_of_the_last_lines_is_dropped(tmp_path: Path, end: bytes) -> None:
    (tmp_path / METRICS).write_bytes(b'{"step": 1}\n{"step": 2}\n' + end)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    assert steps_logged(tmp_path) == 2


def test_a_tracker_that_fails_is_told_once_and_asked_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    class Away:
        def __getattr__(self, method: str) -> Any:
            def fail(*_: Any) -> None:
                asked.append(method)
                raise ConnectionError("no answer from http://me:canary@server/api")

            return fail

    monkeypatch.setattr(metrics, "open_tracker", lambda *_: (Away(), 0))
    log = MetricsLog(tmp_path, 0, "mlflow")
    for step in (1, 2):
        log.write(line(step))
    log.flush()
    assert asked == ["add_scalar"], "each try may wait for a server's time-out"
    log.try_again_at = 0.0
    log.write(line(3))
    log.flush()
    log.close(weights_moved_share=0.5)
    assert asked == ["add_scalar"] * 3  # the last one at the end
    said = capsys.readouterr().out
    assert said.count("mlflow does not take") == 1 and "http://***@server/api" in said and "canary" not in said
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_tracker_that_cannot_be_opened_is_told_and_opened_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / TENSORBOARD).write_text("a file where its folder has to be")
    log = MetricsLog(tmp_path, 0)
    said = capsys.readouterr().out
    assert "warning: tensorboard does not take the curves" in said and str(tmp_path / METRICS) in said
    log.write(line(1))
    log.flush()
    (tmp_path / TENSORBOARD).unlink()
    log.try_again_at = 0.0
    log.write(line(2))
    log.close(weights_moved_share=0.5)
    assert capsys.readouterr().out == "", "told once"
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    events = EventAccumulator(str(tmp_path / TENSORBOARD))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2], "the missed step too"


def test_a_training_goes_on_without_its_tracker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / TENSORBOARD).write_text("a file where its folder has to be")
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2):
        log.write(line(step))
    log.close(weights_moved_share=0.5)
    assert capsys.readouterr().out.count("does not take the curves") == 1
    assert steps_logged(tmp_path) == 2


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_tracker_whose_package_is_missing_is_still_refused(tmp_path: Path, name: str) -> None:
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed here")
    with pytest.raises(UserError, match="pip install " + INSTALL[name]):
        MetricsLog(tmp_path, 0, name)
