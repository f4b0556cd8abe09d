"""Lock, reuse and order around a worker; the worker is a real process, the stage a small one."""

import threading
from pathlib import Path

import pytest

from tasks.errors import UserError
from tasks.execute import compute
from tasks.plan import Planned
from tasks.stage import Order, read_artifact


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
    assert compute([planned(tmp_path, "work")], "tests.tasks.worker", print, force=True) is False
    [aside] = tmp_path.glob("old.*")
    assert read_artifact(aside) == first


def test_a_missing_input_is_told_before_a_worker_starts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="reads prepare_cpt-gone, which has not been computed"):
        compute([planned(tmp_path, "work", {"rows": str(tmp_path / "prepare_cpt-gone")})], "tests.tasks.worker", print)


def test_a_refused_stage_leaves_nothing_half_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="bad row"):
        compute([planned(tmp_path, "refuse")], "tests.tasks.worker", print)
    left = {path.name for path in planned(tmp_path, "refuse").directory.iterdir()}
    assert left == {"order.json", "worker.log", "error.txt"}
