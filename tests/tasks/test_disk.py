"""What a disk refuses is told as that, whatever the libraries between make of it."""

import errno
import os
from pathlib import Path

import pytest

from tasks import hub
from tasks.disk import free_bytes, writes_told
from tasks.errors import UserError
from tasks.room import check_disk, stage_bytes


def test_a_full_disk_behind_an_error_of_ours_is_told(tmp_path: Path) -> None:
    """datasets makes its cache while lm-eval reads a task: whatever goes wrong there is taken for a bad task."""
    with pytest.raises(UserError, match="the disk is full"), writes_told(tmp_path):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise UserError("the evaluation task 'x' does not load") from None


def test_bad_input_stays_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"), writes_told(tmp_path):
        try:
            (tmp_path / "gone").read_text()
        except OSError:
            raise UserError("no such file: gone") from None


def test_the_disk_that_is_full_is_the_one_that_was_written(tmp_path: Path) -> None:
    other = tmp_path / "other"
    with (
        pytest.raises(UserError, match=f"a write below {other} was refused") as told,
        writes_told(tmp_path / "runs/cpt-1"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device", str(other / "file"))
    assert "runs_dir" not in told.value.todo
    with pytest.raises(UserError, match="runs/cpt-1 was refused") as told, writes_told(tmp_path / "runs/cpt-1"):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "runs/cpt-1/model/file"))
    assert "runs_dir" in told.value.todo


def test_a_full_cache_of_the_hub_is_told_as_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    def fill(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fill)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="the disk is full") as told, writes_told(tmp_path / "runs/cpt-1"):
        hub.fetch_model("some/model", "0123456789abcdef0123456789abcdef01234567")
    assert told.value.where == str(tmp_path / "cache" / "models--some--model") and "HF_HOME" in told.value.todo


def test_a_damaged_checkpoint_is_no_room_for_others(tmp_path: Path) -> None:
    """It stays until the stage is done; a sound one makes way for the next."""
    parameters = (free_bytes(tmp_path) + (1 << 30)) // stage_bytes(1, "fp32-master", 1)  # a gigabyte more than there is
    check = lambda: check_disk(tmp_path, int(parameters), "fp32-master", 1)  # noqa: E731
    with pytest.raises(UserError, match="too small"):
        check()
    weights = tmp_path / "checkpoints" / "checkpoint-00000010" / "state" / "weights"
    weights.parent.mkdir(parents=True)
    weights.touch()
    os.truncate(weights, 2 << 30)  # sparse: it takes no room itself
    check()
    weights.parents[1].rename(tmp_path / "checkpoints" / "damaged-checkpoint-00000010")
    with pytest.raises(UserError, match="too small"):
        check()
