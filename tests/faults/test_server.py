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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from flows.pools import POOL_LIMITS
from tasks.stage import ARTIFACT, file_sha256, read_artifact
from tests.conftest import laws, write_lines
from tests.faults.table import Table
from tests.faults.test_signals import num_steps
from tests.faults.world import MARK, World
from tests.operations.conftest import FINAL, Served, forget, make_project, serve, wait_for

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]
SECONDS_TO_CANCEL, SECONDS_TO_CRASHED = 15.0, 180.0
STEPS = 1024
ENDINGS = [signal.SIGTERM, signal.SIGINT, signal.SIGKILL]
OF_A_RUN = ("-m tasks.", "guard.py", "prefect.engine", "flow-run execute", "flow_engine")


@dataclass
class House:
    """A served project, and the census of its processes."""

    project: Path
    world: World
    served: Served

    def serve(self) -> None:
        """Start `make serve`, also again."""
        output = self.project / f"serve-{time.monotonic_ns()}.out"  # a new one: it is read for the sign that all stands
        process, url = serve(self.project, output)
        self.served = Served(self.project, url, process, output)

    def of_a_run(self) -> dict[int, str]:
        """Processes of flow runs and of what they started; services are none of them."""
        return {pid: line for pid, line in self.world.processes().items()
                if any(part in line for part in OF_A_RUN) and "--grace 27" not in line}  # fmt: skip


@pytest.fixture(scope="module")
def house(tiny_base: Path) -> Iterator[House]:
    """A project with a training of half a minute, served."""
    project = make_project(tiny_base)
    write_lines(project / "laws.jsonl", laws(6000))
    write_lines(project / "general.jsonl", [{"text": f"The river of town {n} is {n * 3} miles."} for n in range(4000)])
    config = project / "configs/regulator.yaml"
    text = config.read_text().replace("tokens: 4096", f"tokens: {STEPS * 64}", 1)
    text = text.replace(
        "  batch_tokens: 512", "  batch_tokens: 64\n  checkpoint: {every_steps: 50, every_minutes: null}", 1
    )
    config.write_text(text)
    world = World(project)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(MARK, world.mark)
        made = House(project, world, None)  # type: ignore[arg-type]
        made.serve()
        yield made
        made.served.process.send_signal(signal.SIGINT)
        made.served.process.wait(90)
    world.wait_until_gone()
    forget(project, made.served.output)


def begin(house: House, name: str, seed: int, moment: random.Random) -> tuple[str, Path]:
    """A run up to CPT of a config of its own, some steps into its training; its id and the training's directory."""
    config = house.project / f"configs/{name}.yaml"
    config.write_text((house.project / "configs/regulator.yaml").read_text().replace("seed: 0", f"seed: {seed}"))
    before = set(house.project.glob("runs/cpt-*"))
    run_id = house.served.start_run(config=f"configs/{name}.yaml", until="cpt")
    wait_for(lambda: set(house.project.glob("runs/cpt-*")) - before, 240)
    [directory] = set(house.project.glob("runs/cpt-*")) - before
    wanted = moment.randint(60, STEPS // 3)
    wait_for(lambda: num_steps(directory) >= wanted, 240)
    return run_id, directory


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


def complete(house: House, name: str) -> None:
    """The next run of the same config completes."""
    run = house.served.wait_for_run(house.served.start_run(config=f"configs/{name}.yaml", until="cpt"))
    assert run["state_name"] == "Completed", run["state"]["message"]


def kill(house: House, which: Callable[[str], bool], number: signal.Signals = signal.SIGKILL) -> None:
    """Send it to every process of the house whose command line is meant, at once."""
    pids = [pid for pid, line in house.world.processes().items() if which(line)]
    assert pids, "\n".join(house.world.processes().values())
    for pid in pids:
        os.kill(pid, number)


def lose(house: House) -> float:
    """Kill the worker and its runs as when their machine is gone: neither reports the end of the other; the moment of it."""
    stop(set(house.of_a_run()), signal.SIGSTOP)  # the kernel tells them that the worker died
    kill(house, lambda line: "worker start" in line)
    stop(set(house.of_a_run()), signal.SIGKILL)
    return time.monotonic()


def stop(pids: set[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def until_shown(house: House, run_id: str, began: float, wanted: str = "Crashed") -> float:
    """The seconds until a lost run is shown as what it is."""
    wait_for(lambda: has_ended(house, run_id), SECONDS_TO_CRASHED + 30)
    took = time.monotonic() - began
    print(f"lost: shown as {state(house, run_id)} after {took:.0f} s")
    assert state(house, run_id) == wanted and took <= SECONDS_TO_CRASHED
    return took


def state(house: House, run_id: str) -> str:
    return str(house.served.api(f"/flow_runs/{run_id}")["state_name"])


def test_a_cancelled_run_ends_at_once_and_a_retry_resumes(house: House, table: Table, moment: random.Random) -> None:
    fault = table.tried("cancel by API, then retry", "training")
    run_id, directory = begin(house, "cancelled", 11, moment)
    began = time.monotonic()
    house.served.api(f"/flow_runs/{run_id}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    wait_for(lambda: not house.of_a_run(), 60)
    took = time.monotonic() - began
    wait_for(lambda: state(house, run_id) in ("Cancelled", "Crashed", "Failed"), 60)
    print(f"cancelled: its processes were gone after {took:.1f} s, shown as {state(house, run_id)}")
    assert state(house, run_id) == "Cancelled"
    assert took <= SECONDS_TO_CANCEL
    environment = os.environ | {
        "PREFECT_API_URL": f"{house.served.url}/api",
        "PREFECT_HOME": str(house.project / ".prefect"),
    }
    command = [sys.executable, "-m", "prefect", "--no-prompt", "flow-run", "retry", run_id]
    subprocess.run(command, check=True, env=environment, cwd=house.project, timeout=120)
    wait_for(lambda: state(house, run_id) != "Cancelled", 60)
    assert house.served.wait_for_run(run_id)["state_name"] == "Completed"
    assert_resumed_and_same(house, directory, "cancelled")
    fault.seconds_lost, fault.survived = round(took, 1), True


def test_a_lost_worker_leaves_a_crashed_run(house: House, table: Table, moment: random.Random) -> None:
    """Worker, flow run and trainer vanish together, as when their machine does."""
    fault = table.tried("worker and its run lost (SIGKILL of all of it): seconds until Crashed", "training")
    run_id, directory = begin(house, "lost", 12, moment)
    took = until_shown(house, run_id, lose(house))
    complete(house, "lost")
    assert_resumed_and_same(house, directory, "lost")
    fault.seconds_lost, fault.survived = round(took, 1), True


def test_runs_lost_while_pending_leave_their_slots(house: House, table: Table) -> None:
    """They never sent a heartbeat that could be missed. Nor does a run that waits for a slot, and it goes on waiting."""
    fault = table.tried("worker and its runs lost while Pending: seconds until Crashed", "submitting")
    lost = [house.served.start_run(config="configs/regulator.yaml", only="prepare") for _ in range(POOL_LIMITS["cpu"])]
    wait_for(lambda: all(state_type(house, run_id) == "PENDING" for run_id in lost) and house.of_a_run(), 60)
    began = lose(house)
    waiting = house.served.start_run(config="configs/regulator.yaml", only="prepare")
    time.sleep(10)  # by now one that still lived would be Running, and the new worker would have taken the third
    assert [state_type(house, run_id) for run_id in [*lost, waiting]] == ["PENDING", "PENDING", "SCHEDULED"]
    took = max(until_shown(house, run_id, began) for run_id in lost)
    assert house.served.wait_for_run(waiting)["state_name"] == "Completed"
    fault.seconds_lost, fault.survived = round(took, 1), True


def test_a_lost_run_that_is_cancelled_ends(house: House, table: Table, moment: random.Random) -> None:
    """Nobody is left who could do it: neither a heartbeat nor an end follows the request."""
    fault = table.tried("worker and its run lost, then cancelled: seconds until Cancelled", "training")
    run_id, _ = begin(house, "lost-cancelled", 13, moment)
    lose(house)
    began = time.monotonic()
    house.served.api(f"/flow_runs/{run_id}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    assert state(house, run_id) == "Cancelling"
    took = until_shown(house, run_id, began, "Cancelled")
    complete(house, "lost-cancelled")
    fault.seconds_lost, fault.survived = round(took, 1), True


@pytest.mark.parametrize("number", ENDINGS)
@pytest.mark.parametrize("which", ["worker", "server"])
def test_a_service_dies(house: House, table: Table, moment: random.Random, which: str, number: signal.Signals) -> None:
    """It is started again. Without its server a run goes on to its end; a worker takes its run along, which the next
    one resumes."""
    name = f"{which}-{number.name.lower()}"
    fault = table.tried(f"{number.name} of Prefect's {which}", "training")
    seed = 20 + ["worker", "server"].index(which) * len(ENDINGS) + ENDINGS.index(number)
    run_id, directory = begin(house, name, seed, moment)
    began = time.monotonic()
    part = f"{which} start"
    old = set(house.world.find(part))
    kill(house, lambda line: part in line and "guard" not in line, number)
    wait_for(lambda: set(house.world.find(part)) - old, 120)
    wait_for(lambda: not house.of_a_run(), 400)  # a server that was away may show a run as Crashed that still runs
    wait_for(lambda: has_ended(house, run_id), SECONDS_TO_CRASHED + 30)
    print(f"{name}: the run ended as {state(house, run_id)} after {time.monotonic() - began:.0f} s")
    assert state(house, run_id) == ("Completed" if which == "server" else "Crashed")
    assert (directory / ARTIFACT).is_file() == (which == "server"), "only a training that nobody stopped is done"
    alone = (directory / ARTIFACT).read_bytes() if which == "server" else b""
    complete(house, name)
    if which == "server":
        assert not read_artifact(directory)["counts"]["resumed_from"], "it was stopped"
        assert (directory / ARTIFACT).read_bytes() == alone, "it was computed twice"
    else:
        assert_resumed_and_same(house, directory, name)
    fault.survived = True


def test_the_machine_restarts(house: House, table: Table, moment: random.Random) -> None:
    fault = table.tried("machine restart: everything killed at once, then `make serve`", "training")
    run_id, directory = begin(house, "restart", 30, moment)
    house.world.end_all()
    house.served.process.wait(30)
    began = time.monotonic()
    house.serve()
    wait_for(lambda: state(house, run_id) != "Running", SECONDS_TO_CRASHED)
    shown = state(house, run_id)
    print(f"restart: the run shows {shown} {time.monotonic() - began:.0f} s after `make serve`")
    assert shown in ("Crashed", "AwaitingRetry", "Completed", "Scheduled"), shown
    complete(house, "restart")
    assert_resumed_and_same(house, directory, "restart")
    fault.seconds_lost, fault.survived = round(time.monotonic() - began, 1), True


def state_type(house: House, run_id: str) -> str:
    return str(house.served.api(f"/flow_runs/{run_id}")["state_type"])


def has_ended(house: House, run_id: str) -> bool:
    """Whether the server answers and says so; one that ends takes connections for a while, then refuses them."""
    try:
        return state_type(house, run_id) in FINAL
    except httpx.TransportError:
        return False
