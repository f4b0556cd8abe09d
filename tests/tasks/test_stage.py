"""A stage's directory: identity, artifact, damage, lock."""

import errno
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tasks import stage
from tasks.errors import UserError
from tasks.plan import output_digest, why_not_reused
from tasks.stage import Order, damage, finish, is_done, read_artifact, read_order, set_aside, stage_lock, write_order
from tests.conftest import ROOT

ORDER = Order("cpt", "train", "tiny", {"learning_rate": 1e-5, "init": {"a": 1, "b": 2}}, {"tag": "cpu"}, {"rows": "x"})


def finished(runs: Path, order: Order = ORDER) -> Path:
    directory = write_order(order, runs)
    (directory / "model").mkdir()
    (directory / "model" / "weights").write_bytes(b"12345678")
    finish(directory, ["model"], {"steps": 3}, 1.5)
    return directory


def test_where_it_runs_is_no_part_of_the_key() -> None:
    elsewhere = replace(ORDER, how={"tag": "8xh100-80gb", "processes": 8}, run="other", inputs={"rows": "y"})
    assert elsewhere.key == ORDER.key


def test_what_is_computed_is_the_key_whatever_the_order_of_its_fields() -> None:
    assert replace(ORDER, what={"init": {"b": 2, "a": 1}, "learning_rate": 1e-5}).key == ORDER.key
    assert replace(ORDER, what=ORDER.what | {"learning_rate": 2e-5}).key != ORDER.key


def test_a_stage_is_done_with_its_artifact_and_not_before(tmp_path: Path) -> None:
    directory = write_order(ORDER, tmp_path)
    assert not is_done(directory)
    directory = finished(tmp_path)
    assert is_done(directory)
    assert read_artifact(directory)["counts"] == {"steps": 3}
    assert read_order(directory) == ORDER


def test_outputs_and_their_folders_are_on_the_disk_before_the_artifact_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(Path(f"/proc/self/fd/{descriptor}").readlink()))
    directory = finished(tmp_path)
    artifact = next(number for number, path in enumerate(synced) if path.name.startswith(".artifact.json"))
    assert {directory, directory / "model", directory / "model" / "weights"} <= set(synced[:artifact])
    assert synced[-1] == directory, "the name of the artifact itself"


@pytest.mark.parametrize("harm", ["delete", "truncate", "flip"])
def test_damage_to_an_output_is_seen(tmp_path: Path, harm: str) -> None:
    directory = finished(tmp_path)
    weights = directory / "model" / "weights"
    if harm == "delete":
        weights.unlink()
    else:
        weights.write_bytes(b"1234" if harm == "truncate" else b"12345679")
    assert "model/weights" in damage(directory)
    assert not is_done(directory)


def test_a_touched_file_with_the_same_content_is_no_damage(tmp_path: Path) -> None:
    directory = finished(tmp_path)
    os.utime(directory / "model" / "weights", (1, 1))
    assert damage(directory) == ""


def test_setting_aside_keeps_every_byte(tmp_path: Path) -> None:
    directory = finished(tmp_path)
    aside = set_aside(directory)
    assert aside and not directory.exists()
    assert (aside / "model" / "weights").read_bytes() == b"12345678"
    assert set_aside(finished(tmp_path)) != aside  # within the same second


def test_a_folder_that_is_no_stage_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no order\.json"):
        read_order(tmp_path)


HOLD = """
import sys, time
from pathlib import Path
from tasks.stage import stage_lock
with stage_lock(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_killed_holder_frees_the_lock_at_once(tmp_path: Path) -> None:
    directory = tmp_path / "cpt-1"
    command = [sys.executable, "-c", HOLD, str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as holder:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match=f"is being computed by process {holder.pid}"),
            stage_lock(directory, print, wait=False),
        ):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    started = time.monotonic()
    with stage_lock(directory, print, wait=False) as descriptor:
        assert descriptor > 2
    assert time.monotonic() - started < 1


def test_who_waits_is_told_whom_for(tmp_path: Path) -> None:
    directory, told = tmp_path / "cpt-1", []
    command = [sys.executable, "-c", HOLD.replace("60", "1.5"), str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as holder:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        with stage_lock(directory, told.append):
            assert holder.poll() is not None or holder.wait(5) == 0
        assert told and f"process {holder.pid}" in told[0]


def test_who_waits_is_told_on_which_machine(tmp_path: Path) -> None:
    with stage_lock(tmp_path / "cpt-1", print), pytest.raises(UserError) as refused:  # noqa: SIM117
        with stage_lock(tmp_path / "cpt-1", print, wait=False):
            pass
    assert f"process {os.getpid()} on {os.uname().nodename}, since 2" in refused.value.what


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(_descriptor: int, _operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(stage.fcntl, "flock", refuse)
    with pytest.raises(UserError, match="gives no locks") as refused, stage_lock(tmp_path / "cpt-1", print):
        pass
    assert str(tmp_path) in refused.value.what and "runs_dir" in refused.value.todo


def test_a_lock_that_a_cleaner_removed_lets_no_two_in(tmp_path: Path) -> None:
    directory, removed = tmp_path / "cpt-1", tmp_path / ".locks" / "cpt-1.lock"
    command = [sys.executable, "-c", HOLD.replace("60", "1.5"), str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as holder:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        with stage_lock(directory, lambda _: removed.unlink()):  # while we wait for it
            assert holder.wait(5) == 0
            with pytest.raises(UserError, match="is being computed"), stage_lock(directory, print, wait=False):
                pass


@pytest.mark.parametrize("file", ["artifact.json", "order.json"])
def test_a_rotten_record_is_told_without_a_traceback(tmp_path: Path, file: str) -> None:
    directory = finished(tmp_path)
    assert is_done(directory)
    (directory / file).write_bytes((directory / file).read_bytes()[:40])
    if file == "artifact.json":
        assert not is_done(directory)
        assert why_not_reused(directory) == ["artifact.json is unreadable"] and output_digest(directory) == ""
    else:
        assert_order_is_damaged(directory)


@pytest.mark.parametrize(
    "change",
    [('"outputs"', '"oupputs"'), ('"bytes": 8', '"bxtes": 8'), ('"bytes": 8', '"bytes": "8"'), ('"how"', '"hov"')],
)
def test_a_bit_that_flipped_in_an_artifact_is_a_reason_to_run_again(tmp_path: Path, change: tuple[str, str]) -> None:
    directory = finished(tmp_path)
    text = (directory / "artifact.json").read_text()
    (directory / "artifact.json").write_text(text.replace(*change))
    assert text != text.replace(*change)
    assert why_not_reused(directory) == ["artifact.json is unreadable"] and output_digest(directory) == ""


def assert_order_is_damaged(directory: Path) -> None:
    """A reason to run again for the plan, one message for a worker."""
    assert why_not_reused(directory) == ["order.json is unreadable, or not what its key says"]
    assert not is_done(directory) and output_digest(directory) == ""
    with pytest.raises(UserError, match=r"order.json is unreadable"):
        read_order(directory)


@pytest.mark.parametrize(
    "change",
    [('"stage"', '"stagg"'), ('"kind"', '"kine"'), ('"kind": "train"', '"kind": "traij"'), ('"run"', '"rwn"'),
     ('"what"', '"whau"'), ('"how"', '"hov"'), ('"inputs"', '"inputr"'), ('"key"', '"kez"'), ('"version"', '"verqion"'),
     ('"learning_rate"', '"learninf_rate"'), ("1e-05", "3e-05"), ('"rows": "x"', '"rows": 8')],
)  # fmt: skip
def test_a_bit_that_flipped_in_an_order_is_a_reason_to_run_again(tmp_path: Path, change: tuple[str, str]) -> None:
    directory = finished(tmp_path)
    text = (directory / "order.json").read_text()
    assert text.count(change[0]) == 1 and is_done(directory)
    (directory / "order.json").write_text(text.replace(*change))
    assert_order_is_damaged(directory)


def test_an_order_of_an_earlier_version_is_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = finished(tmp_path)
    monkeypatch.setitem(stage.VERSIONS, "train", 2)
    assert damage(directory) == "" and read_order(directory) == ORDER


def test_an_output_that_cannot_be_read_is_a_reason_to_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> str:
        raise OSError(errno.EIO, "Input/output error", str(path))

    directory = finished(tmp_path)
    os.utime(directory / "model" / "weights", (1, 1))
    monkeypatch.setattr(stage, "file_sha256", refuse)
    assert why_not_reused(directory) == ["model/weights cannot be read: Input/output error"]


def test_what_a_killed_run_was_writing_goes_when_the_stage_is_finished(tmp_path: Path) -> None:
    directory = write_order(ORDER, tmp_path)
    (directory / ".artifact.json.4711").write_text("{")
    (directory / ".samples.4711").mkdir()
    assert finished(tmp_path) == directory
    assert {path.name for path in directory.iterdir()} == {"order.json", "artifact.json", "model"}
