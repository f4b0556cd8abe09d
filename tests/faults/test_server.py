"""`make serve` with everything that can die in it: cancelled runs, lost workers, a killed server, a machine that restarts."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.pools import POOL_LIMITS
from tasks.stage import ARTIFACT, file_sha256, read_artifact
from tests.faults.house import SECONDS_TO_CANCEL, SECONDS_TO_CRASHED, House, served_house
from tests.faults.table import Table
from tests.operations.conftest import wait_for

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]
SECONDS_AWAY = 45.0  # and a start more; behind 120 without a heartbeat its runs would be shown as Crashed
ENDINGS = [signal.SIGTERM, signal.SIGINT, signal.SIGKILL]


@pytest.fixture(scope="module")
def house(tiny_base: Path) -> Iterator[House]:
    """One for all cases: each starts runs of its own."""
    with served_house(tiny_base) as made:
        yield made


def assert_resumed_and_same(house: House, directory: Path, name: str) -> None:
    """The training went on from a checkpoint and ended as an undisturbed one does."""
    assert read_artifact(directory)["counts"]["resumed_from"], "it started over"
    config = house.project / f"configs/{name}-undisturbed.yaml"
    config.write_text(
        (house.project / f"configs/{name}.yaml").read_text().replace("runs_dir: ./runs", "runs_dir: ./undisturbed")
    )
    command = [sys.executable, "-m", "tests.faults.drive", str(config), "cpu", "prepare", "cpt"]
    subprocess.run(
        command, check=True, cwd=house.project, env=os.environ | {"PYTHONPATH": str(house.project)}, timeout=600
    )
    other = house.project / "undisturbed" / directory.name
    [ours] = directory.glob("model/*.safetensors")
    assert file_sha256(ours) == file_sha256(other / "model" / ours.name)
    shutil.rmtree(other.parent)


def lose(house: House) -> float:
    """Kill the worker and its runs as when their machine is gone: neither reports the end of the other; the moment of it."""
    stop(set(house.of_a_run()), signal.SIGSTOP)  # the kernel tells them that the worker died
    house.kill(lambda line: "worker start" in line)
    stop(set(house.of_a_run()), signal.SIGKILL)
    return time.monotonic()


def stop(pids: set[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def until_shown(house: House, run_id: str, began: float, wanted: str = "Crashed") -> float:
    """The seconds until a lost run is shown as what it is."""
    wait_for(lambda: house.has_ended(run_id), SECONDS_TO_CRASHED + 30)
    took = time.monotonic() - began
    print(f"lost: shown as {house.state(run_id)} after {took:.0f} s")
    assert house.state(run_id) == wanted and took <= SECONDS_TO_CRASHED
    return took


def test_a_cancelled_run_ends_at_once_and_a_retry_resumes(house: House, table: Table, moment: random.Random) -> None:
    fault = table.tried("cancel by API, then retry", "training")
    run_id, directory = house.begin("cancelled", 11, moment)
    began = time.monotonic()
    house.cancel(run_id)
    wait_for(lambda: not house.of_a_run(), 60)
    took = time.monotonic() - began
    wait_for(lambda: house.state(run_id) in ("Cancelled", "Crashed", "Failed"), 60)
    print(f"cancelled: its processes were gone after {took:.1f} s, shown as {house.state(run_id)}")
    assert house.state(run_id) == "Cancelled"
    assert took <= SECONDS_TO_CANCEL
    environment = os.environ | {
        "PREFECT_API_URL": f"{house.served.url}/api",
        "PREFECT_HOME": str(house.project / ".prefect"),
    }
    command = [sys.executable, "-m", "prefect", "--no-prompt", "flow-run", "retry", run_id]
    subprocess.run(command, check=True, env=environment, cwd=house.project, timeout=120)
    wait_for(lambda: house.state(run_id) != "Cancelled", 60)
    assert house.served.wait_for_run(run_id)["state_name"] == "Completed"
    assert_resumed_and_same(house, directory, "cancelled")
    fault.seconds_lost, fault.survived = round(took, 1), True


def test_a_lost_worker_leaves_a_crashed_run(house: House, table: Table, moment: random.Random) -> None:
    """Worker, flow run and trainer vanish together, as when their machine does."""
    fault = table.tried("worker and its run lost (SIGKILL of all of it): seconds until Crashed", "training")
    run_id, directory = house.begin("lost", 12, moment)
    took = until_shown(house, run_id, lose(house))
    house.complete("lost")
    assert_resumed_and_same(house, directory, "lost")
    fault.seconds_lost, fault.survived = round(took, 1), True


def test_runs_lost_while_pending_leave_their_slots(house: House, table: Table) -> None:
    """They never sent a heartbeat that could be missed. Nor does a run that waits for a slot, and it goes on waiting."""
    fault = table.tried("worker and its runs lost while Pending: seconds until Crashed", "submitting")
    lost = [house.served.start_run(config="configs/regulator.yaml", only="prepare") for _ in range(POOL_LIMITS["cpu"])]
    wait_for(lambda: all(house.state_type(run_id) == "PENDING" for run_id in lost) and house.of_a_run(), 60)
    began = lose(house)
    waiting = house.served.start_run(config="configs/regulator.yaml", only="prepare")
    time.sleep(10)  # by now one that still lived would be Running, and the new worker would have taken the third
    assert [house.state_type(run_id) for run_id in [*lost, waiting]] == ["PENDING", "PENDING", "SCHEDULED"]
    took = max(until_shown(house, run_id, began) for run_id in lost)
    assert house.served.wait_for_run(waiting)["state_name"] == "Completed"
    fault.seconds_lost, fault.survived = round(took, 1), True


def test_a_lost_run_that_is_cancelled_ends(house: House, table: Table, moment: random.Random) -> None:
    """Nobody is left who could do it: neither a heartbeat nor an end follows the request."""
    fault = table.tried("worker and its run lost, then cancelled: seconds until Cancelled", "training")
    run_id, _ = house.begin("lost-cancelled", 13, moment)
    lose(house)
    began = time.monotonic()
    house.cancel(run_id)
    assert house.state(run_id) == "Cancelling"
    took = until_shown(house, run_id, began, "Cancelled")
    house.complete("lost-cancelled")
    fault.seconds_lost, fault.survived = round(took, 1), True


@pytest.mark.parametrize("number", ENDINGS)
@pytest.mark.parametrize("which", ["worker", "server"])
def test_a_service_dies(house: House, table: Table, moment: random.Random, which: str, number: signal.Signals) -> None:
    """It is started again. Without its server a run goes on to its end; a worker takes its run along, which the next
    one resumes."""
    name = f"{which}-{number.name.lower()}"
    fault = table.tried(f"{number.name} of Prefect's {which}", "training")
    seed = 20 + ["worker", "server"].index(which) * len(ENDINGS) + ENDINGS.index(number)
    run_id, directory = house.begin(name, seed, moment)
    began = time.monotonic()
    part = f"{which} start"
    old = set(house.world.find(part))
    house.kill(lambda line: part in line and "guard" not in line, number)
    wait_for(lambda: set(house.world.find(part)) - old, 120)
    wait_for(lambda: not house.of_a_run(), 400)  # a server that was away may show a run as Crashed that still runs
    wait_for(lambda: house.has_ended(run_id), SECONDS_TO_CRASHED + 30)
    print(f"{name}: the run ended as {house.state(run_id)} after {time.monotonic() - began:.0f} s")
    assert house.state(run_id) == ("Completed" if which == "server" else "Crashed")
    assert (directory / ARTIFACT).is_file() == (which == "server"), "only a training that nobody stopped is done"
    alone = (directory / ARTIFACT).read_bytes() if which == "server" else b""
    house.complete(name)
    if which == "server":
        assert not read_artifact(directory)["counts"]["resumed_from"], "it was stopped"
        assert (directory / ARTIFACT).read_bytes() == alone, "it was computed twice"
    else:
        assert_resumed_and_same(house, directory, name)
    fault.survived = True


def test_a_run_can_be_cancelled_once_its_server_is_back(house: House, table: Table, moment: random.Random) -> None:
    """Away for longer than the half minute after which Prefect's own worker watches for no cancellation any more."""
    fault = table.tried("server away for a minute, then cancel: seconds until it is gone", "training")
    run_id, directory = house.begin("deaf", 27, moment)
    training = {pid for pid, line in house.of_a_run().items() if "-m tasks.training" in line and "guard" not in line}
    stop(training, signal.SIGSTOP)  # it is over too soon else
    back_at = time.monotonic() + SECONDS_AWAY
    while time.monotonic() < back_at:
        with contextlib.suppress(AssertionError):  # it is not there, as it should be
            house.kill(lambda line: "server start" in line and "guard" not in line)
        time.sleep(0.2)
    wait_for(house.served.answers, 180)
    time.sleep(5)  # a worker asks anew every second
    assert house.state(run_id) == "Running", "it was away for too long"
    stop(training, signal.SIGCONT)
    began = time.monotonic()
    house.cancel(run_id)
    wait_for(lambda: not house.of_a_run(), 60)
    took = time.monotonic() - began
    assert not (directory / ARTIFACT).is_file(), "nothing was left to cancel"
    wait_for(lambda: house.has_ended(run_id), 60)
    print(f"cancelled after its server was away: gone after {took:.1f} s, shown as {house.state(run_id)}")
    assert house.state(run_id) == "Cancelled" and took <= SECONDS_TO_CANCEL
    house.complete("deaf")
    assert_resumed_and_same(house, directory, "deaf")
    fault.seconds_lost, fault.survived = round(took, 1), True


def test_the_machine_restarts(house: House, table: Table, moment: random.Random) -> None:
    fault = table.tried("machine restart: everything killed at once, then `make serve`", "training")
    run_id, directory = house.begin("restart", 30, moment)
    house.world.end_all()
    house.served.process.wait(30)
    began = time.monotonic()
    house.serve()
    wait_for(lambda: house.state(run_id) != "Running", SECONDS_TO_CRASHED)
    shown = house.state(run_id)
    print(f"restart: the run shows {shown} {time.monotonic() - began:.0f} s after `make serve`")
    assert shown in ("Crashed", "AwaitingRetry", "Completed", "Scheduled"), shown
    house.complete("restart")
    assert_resumed_and_same(house, directory, "restart")
    fault.seconds_lost, fault.survived = round(time.monotonic() - began, 1), True
