"""Lock, reuse and order around a worker; the worker is a real process, the stage a small one."""

import threading
from pathlib import Path

import pytest

from tasks.errors import UserError
from tasks.execute import compute
from tasks.launch import Preempted
from tasks.plan import Planned, changed_inputs
from tasks.stage import Order, finish, is_done, read_artifact, read_order


def planned(runs: Path, deed: str, inputs: dict[str, str] | None = None) -> Planned:
    order = Order("prepare_cpt", "prepare", "tiny", {"deed": deed}, {"device": "cpu"}, inputs or {})
    return Planned(order, order.directory(runs), ("not yet run",))


def test_what_stands_is_reused(tmp_path: Path) -> None:
    said: list[str] = []
    assert compute([planned(tmp_path, "work")], "tests.tasks.worker", said.append) is False
    assert compute([planned(tmp_path, "work")], "tests.tasks.worker", said.append) is True
    assert "reused" in said[-1]


def test_two_runs_of_one_stage_compute_it_once(tmp_path: Path) -> None:
    reused, said = [], []
    run = lambda: reused.append(compute([planned(tmp_path, "work slowly")], "tests.tasks.worker", said.append))  # noqa: E731
    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(reused) == [False, True]
    assert any("waiting: process" in line for line in said)


def test_forcing_computes_again_and_keeps_the_old(tmp_path: Path) -> None:
    compute([planned(tmp_path, "work")], "tests.tasks.worker", print)
    first = read_artifact(planned(tmp_path, "work").directory)
    assert compute([planned(tmp_path, "work")], "tests.tasks.worker", print, force="a request") is False
    [aside] = tmp_path.glob("old.*")
    assert read_artifact(aside) == first


def stopped(stage: Planned, force: str = "") -> None:
    with pytest.raises(Preempted):
        compute([stage], "tests.tasks.worker", print, force)


def test_a_forced_stage_goes_on_when_it_is_forced_again(tmp_path: Path) -> None:
    stage = planned(tmp_path, "needs tries 3")
    stopped(stage)
    stopped(stage, "one run")  # it may be forced because its checkpoints are no good
    assert len(list(tmp_path.glob("old.*"))) == 1
    stopped(stage)  # goes on, and stays what a forced run began
    assert compute([stage], "tests.tasks.worker", print, force="another run") is False
    assert read_artifact(stage.directory)["counts"] == {"tries": 3}
    assert len(list(tmp_path.glob("old.*"))) == 1, "nothing was thrown away"


def test_a_retry_of_the_run_that_forced_a_stage_reuses_what_it_made(tmp_path: Path) -> None:
    stage = planned(tmp_path, "work")
    assert compute([stage], "tests.tasks.worker", print) is False
    assert compute([stage], "tests.tasks.worker", print, force="one run") is False
    assert compute([stage], "tests.tasks.worker", print, force="one run") is True
    assert compute([stage], "tests.tasks.worker", print, force="another run") is False
    assert len(list(tmp_path.glob("old.*"))) == 2


def test_a_stage_does_not_go_on_from_what_it_made_of_other_inputs(tmp_path: Path) -> None:
    rows = planned(tmp_path, "work")
    compute([rows], "tests.tasks.worker", print)
    order = Order("cpt", "train", "tiny", {"deed": "needs tries 3"}, {"device": "cpu"}, {"rows": str(rows.directory)})
    stage = Planned(order, order.directory(tmp_path), ("not yet run",))
    stopped(stage)
    digests = read_order(stage.directory).how["input_digests"]
    stopped(stage)  # the same input: it goes on
    compute([rows], "tests.tasks.worker", print, force="a request")
    assert changed_inputs(stage.directory) == [], "the same bytes came out: nothing to begin anew for"
    (rows.directory / "rows.arrow").write_text("other rows")
    finish(rows.directory, ["rows.arrow"], {}, 0.0)
    said: list[str] = []
    with pytest.raises(Preempted):
        compute([stage], "tests.tasks.worker", said.append)
    [aside] = tmp_path.glob("old.cpt-*")
    assert f"cpt           what was begun from another {rows.directory.name} stands in {aside}" in said
    assert [path.name for path in stage.directory.glob("checkpoints/*")] == ["1"]
    assert read_order(stage.directory).how["input_digests"] != digests == read_order(aside).how["input_digests"]


def test_a_forced_stage_that_is_refused_keeps_the_old_one(tmp_path: Path) -> None:
    rows = planned(tmp_path, "work")
    compute([rows], "tests.tasks.worker", print)
    stage = planned(tmp_path, "work slowly", {"rows": str(rows.directory)})
    compute([stage], "tests.tasks.worker", print)
    (rows.directory / "artifact.json").unlink()
    with pytest.raises(UserError, match="has not been computed"):
        compute([stage], "tests.tasks.worker", print, force="a request")
    assert is_done(stage.directory) and list(tmp_path.glob("old.*")) == []


def test_a_missing_input_is_told_before_a_worker_starts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="reads prepare_cpt-gone, which has not been computed"):
        compute([planned(tmp_path, "work", {"rows": str(tmp_path / "prepare_cpt-gone")})], "tests.tasks.worker", print)


def test_a_refused_stage_leaves_nothing_half_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="bad row"):
        compute([planned(tmp_path, "refuse")], "tests.tasks.worker", print)
    left = {path.name for path in planned(tmp_path, "refuse").directory.iterdir()}
    assert left == {"order.json", "worker.log", "error.txt"}
