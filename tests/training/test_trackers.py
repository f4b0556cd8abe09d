"""Curves go where `report_to` says; what is not installed here is skipped, and refused with a word to a user."""

import importlib.util
from pathlib import Path

import pytest

from tasks.errors import UserError
from tasks.training.trackers import check_tracker, open_tracker

OTHERS = ("wandb", "mlflow", "trackio")


@pytest.mark.parametrize("name", ["tensorboard", *OTHERS])
def test_a_training_in_two_parts_leaves_one_set_of_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    pytest.importorskip(name)  # behind the variables: Trackio reads its own when it is imported
    directory = tmp_path / "runs" / "cpt-0123456789"
    directory.mkdir(parents=True)
    for first_step in (0, 3):
        tracker = open_tracker(name, directory, first_step)
        for step in range(first_step + 1, first_step + 4):
            tracker.add_scalar("loss", 1 / step, step)
        tracker.flush()
        tracker.close()
    written = {"tensorboard": directory / "tensorboard", "wandb": directory / "wandb",
               "mlflow": tmp_path / "runs" / "mlflow.db", "trackio": tmp_path / "trackio"}[name]  # fmt: skip
    assert written.exists()
    if name == "mlflow":
        import sqlite3

        points = sqlite3.connect(written).execute("select step, value from metrics where key = 'loss' order by step")
        assert points.fetchall() == [(step, 1 / step) for step in range(1, 7)]
    if name == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(written))
        events.Reload()
        assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def test_a_missing_package_is_told_with_what_to_install() -> None:
    missing = [name for name in OTHERS if importlib.util.find_spec(name) is None]
    if not missing:
        pytest.skip("all of them are installed here")
    with pytest.raises(UserError, match=f"pip install {missing[0]}"):
        check_tracker(missing[0])
