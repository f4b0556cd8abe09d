"""Workers are real processes here: how they end, and that nothing of them outlives the one who started them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tasks import launch
from tasks.errors import UserError
from tasks.launch import Preempted, WorkerFailed, python_command, run_worker
from tasks.stage import LOG, Order, is_done, write_order
from tests.conftest import ROOT


def order(runs: Path, deed: str) -> Path:
    return write_order(Order("prepare_cpt", "prepare", "tiny", {"deed": deed}, {"device": "cpu"}, {}), runs)


def run(directory: Path) -> list[str]:
    lines: list[str] = []
    run_worker("tests.tasks.worker", [directory], {"device": "cpu"}, forward=lines.append)
    return lines


def test_marked_lines_reach_the_screen_and_noise_stays_in_the_log(tmp_path: Path) -> None:
    directory = order(tmp_path, "work")
    assert run(directory) == ["deed work"]
    assert "a library's noise" in (directory / LOG).read_text()
    assert is_done(directory)


def test_a_refusal_comes_back_as_the_same_error(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        run(order(tmp_path, "refuse"))
    assert (caught.value.what, caught.value.where, caught.value.todo) == ("bad row", "a.jsonl:7", "mend it")


def test_an_error_of_an_earlier_try_is_forgotten(tmp_path: Path) -> None:
    directory = order(tmp_path, "crash")
    (directory / "error.txt").write_text("   error: stale")
    with pytest.raises(WorkerFailed):
        run(directory)


def test_a_crash_shows_the_end_of_the_log(tmp_path: Path) -> None:
    with pytest.raises(WorkerFailed, match="ZeroDivisionError: the reason") as caught:
        run(order(tmp_path, "crash"))
    assert "exited with 1" in str(caught.value) and LOG in str(caught.value)


def test_a_saved_checkpoint_is_not_a_failure(tmp_path: Path) -> None:
    with pytest.raises(Preempted, match=r"run the same command again$"):
        run(order(tmp_path, "preempted"))


START = """
import sys
from pathlib import Path
import tasks.launch as launch
launch.run_worker("tests.tasks.worker", [Path(sys.argv[1])], {"device": "cpu"}, forward=print)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_outlives_its_starter(tmp_path: Path, number: signal.Signals) -> None:
    directory = order(tmp_path, "hang")
    with subprocess.Popen(
        [sys.executable, "-c", START, str(directory)], cwd=ROOT, stderr=subprocess.DEVNULL,
        env=os.environ | {"STEEP_GRACE_SECONDS": "1"},
    ) as starter:  # fmt: skip
        wait_for(lambda: (directory / "pids").exists() and len((directory / "pids").read_text().split()) == 2)
        pids = [int(pid) for pid in (directory / "pids").read_text().split()]
        assert all(alive(pid) for pid in pids)  # worker and grandchild run: there is something to end
        starter.send_signal(number)
        starter.wait(30)
        wait_for(lambda: not any(alive(pid) for pid in pids))  # the grandchild ignores SIGTERM: SIGKILL took it


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition, seconds: float = 20.0) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_a_lock_is_held_for_as_long_as_the_worker_lives(tmp_path: Path) -> None:
    from tasks.stage import stage_lock

    directory = order(tmp_path, "work")
    with stage_lock(directory, print) as descriptor:
        run_worker("tests.tasks.worker", [directory], {"device": "cpu"}, forward=print, lock_descriptors=[descriptor])
        assert f'"lock": "{descriptor}"' in (directory / "artifact.json").read_text()
    assert os.environ.get("STEEP_LOCK_FD") is None


def test_training_starts_under_torchrun_where_it_is_sharded() -> None:
    assert python_command("tasks.training", {"processes": 1}) == [sys.executable, "-m", "tasks.training"]
    assert python_command("tasks.evaluation", {"processes": 8}) == [sys.executable, "-m", "tasks.evaluation"]
    in_files = "--rdzv-backend c10d --rdzv-endpoint /tmp/m/torchrun --log-dir /tmp/m --rdzv-conf store_type=file,"
    for how, said in (
        ({"processes": 2, "meeting": "/tmp/m"}, in_files),
        ({"processes": 2, "meeting": "/tmp/m"}, " --nproc-per-node 2 "),
        ({"processes": 1, "offload": "cpu", "meeting": "/tmp/m"}, " --nproc-per-node 1 "),
        ({"processes": 8, "nodes": 2, "master": "n0:5", "node_rank": 1}, "--nnodes 2 --node-rank 1 --rdzv-backend static "
         "--master-addr n0 --master-port 5 --nproc-per-node 8 "),
    ):  # fmt: skip
        assert said in " ".join(python_command("tasks.training", how))


def test_the_time_to_save_fits_whoever_stops_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT__FLOW_RUN_ID", raising=False)
    monkeypatch.delenv("STEEP_GRACE_SECONDS", raising=False)
    assert launch.grace_seconds() == 20
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "0")
    assert launch.grace_seconds() < 15  # a cancelled run is gone within 15 s
    monkeypatch.setenv("STEEP_GRACE_SECONDS", "300")
    assert launch.grace_seconds() == 300
    monkeypatch.setenv("STEEP_GRACE_SECONDS", "long")
    with pytest.raises(UserError, match="STEEP_GRACE_SECONDS is 'long'"):
        launch.grace_seconds()
