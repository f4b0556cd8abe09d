"""Signals at random moments: afterwards the same command completes, bit for bit, and nothing of ours is left.

One case: the pipeline stands right before a stage. The stage is started, hit in its first phase, started again, hit in the next one,
and so on; the last start is left alone.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tasks.plan import Planned
from tasks.stage import ARTIFACT, is_done
from tests.faults.table import Table
from tests.faults.world import World, num_steps, wait_for

TERM, INT, KILL = signal.SIGTERM, signal.SIGINT, signal.SIGKILL
# How each target's command line is known. The worker under torchrun is a rank.
TARGETS = {
    "worker": (("-m tasks.",), ("guard.py", "torch.distributed.run")),
    "starter": (("tests.faults.drive",), ("guard.py",)),
    "flow": (("-m flows.pipeline",), ("guard.py",)),
    "group": (("-m flows.pipeline",), ("guard.py",)),
    "guard": (("guard.py",), ()),
    "torchrun": (("torch.distributed.run",), ("guard.py",)),
    "rank": (("-m tasks.training",), ("guard.py", "torch.distributed.run")),
}
NAMES = {"worker": "the worker (trainer, tokenizer, evaluator)", "starter": "whoever started the stage", "flow": "the flow's process", "group": "the flow's process group",
         "guard": "the guard", "torchrun": "torchrun", "rank": "one rank of two"}  # fmt: skip
pytestmark = pytest.mark.timeout(1800)  # on a machine that others keep busy, a start takes a minute
STEPS, WARMUP = 128, 26
SECONDS_TO_END = 60.0  # a guard's grace, the kill behind it, and a machine that others keep busy


@dataclass(frozen=True)
class Phase:
    """Where a stage is hit: its group, when the phase begins, and how long a random wait may follow."""

    group: str
    begun: Callable[[Path, random.Random], Callable[[], bool]]
    seconds: float  # 0.02 where the phase is short


def exists(name: str) -> Callable[[Path, random.Random], Callable[[], bool]]:
    return lambda directory, _: (directory / name).exists


def says(text: str) -> Callable[[Path, random.Random], Callable[[], bool]]:
    def begun(directory: Path, _: random.Random) -> Callable[[], bool]:
        log = directory / "worker.log"
        return lambda: log.exists() and text in log.read_text(errors="replace")

    return begun


def steps(first: int, last: int) -> Callable[[Path, random.Random], Callable[[], bool]]:
    def begun(directory: Path, moment: random.Random) -> Callable[[], bool]:
        wanted = moment.randint(first, last)
        return lambda: num_steps(directory) >= wanted

    return begun


def saving(directory: Path, moment: random.Random) -> Callable[[], bool]:
    first = num_steps(directory) // 10 + 2  # a save that is still to come
    wanted, folder = 10 * moment.randint(first, max(first, 12)), directory / "checkpoints" / ".writing"
    return (folder / f"checkpoint-{wanted}").exists


PHASES = {
    "starting": Phase("cpt", exists("worker.log"), 6.0),
    "tokenizing": Phase("prepare", exists("work"), 0.3),
    "packing": Phase("prepare", exists("work/rows.arrow"), 0.02),
    "warm-up": Phase("cpt", steps(1, WARMUP - 2), 0.0),
    "training": Phase("cpt", steps(WARMUP, STEPS // 2), 0.0),
    "checkpointing": Phase("cpt", saving, 0.02),
    "exporting": Phase("cpt", says("exporting the model"), 0.03),
    "evaluating": Phase("evaluate", exists("worker.log"), 9.0),
    "reporting": Phase("report", exists("worker.log"), 1.2),
}


QUICK = [
    pytest.param("prepare", ("packing",), "worker", KILL, id="quick-prepare-worker-SIGKILL"),
    pytest.param("cpt", ("training", "checkpointing"), "starter", KILL, id="quick-cpt-starter-SIGKILL"),
    pytest.param("cpt", ("training",), "group", INT, id="quick-cpt-group-SIGINT"),  # Ctrl-C
]
STORIES = {
    "prepare": ("tokenizing", "packing"),
    "cpt": ("starting", "warm-up", "training", "checkpointing", "exporting"),
    "evaluate": ("evaluating",),
    "report": ("reporting",),
}
ON_ONE = [
    pytest.param(group, phases, target, number, id=f"{group}-{target}-{number.name}")
    for group, phases in STORIES.items() for target in ("worker", "starter") for number in (TERM, INT, KILL)
]  # fmt: skip
GUARD = [
    pytest.param(group, STORIES[group][-3:], "guard", KILL, id=f"{group}-guard-SIGKILL")
    for group in ("cpt", "evaluate")
]
ON_TWO = [
    pytest.param("cpt", ("starting", "training", "checkpointing", "exporting"), target, number, id=f"{target}-{number.name}")
    for target, number in (("torchrun", TERM), ("torchrun", KILL), ("rank", KILL))
] + [pytest.param("cpt", ("training",), target, number, id=f"{target}-{number.name}-once")
     for target, number in (("torchrun", INT), ("rank", TERM), ("starter", KILL))]  # fmt: skip
FLOWS = [
    pytest.param("cpt", ("training", "exporting"), target, number, id=f"{target}-{number.name}")
    for target, number in (("flow", TERM), ("flow", INT), ("flow", KILL), ("group", TERM), ("group", INT))
]


@pytest.mark.parametrize(("group", "phases", "target", "number"), QUICK)
def test_a_signal_now_and_then(
    world: World,
    table: Table,
    moment: random.Random,
    group: str,
    phases: tuple[str, ...],
    target: str,
    number: signal.Signals,
) -> None:
    strike_and_recover(world, table, moment, group, phases, target, number)


@pytest.mark.faults
@pytest.mark.parametrize(("group", "phases", "target", "number"), [*ON_ONE, *GUARD])
def test_signals_at_random_moments(
    world: World,
    table: Table,
    moment: random.Random,
    group: str,
    phases: tuple[str, ...],
    target: str,
    number: signal.Signals,
) -> None:
    strike_and_recover(world, table, moment, group, phases, target, number)


@pytest.mark.faults
@pytest.mark.parametrize(("group", "phases", "target", "number"), ON_TWO)
def test_signals_to_one_of_several_processes(
    world: World,
    table: Table,
    moment: random.Random,
    group: str,
    phases: tuple[str, ...],
    target: str,
    number: signal.Signals,
) -> None:
    strike_and_recover(world, table, moment, group, phases, target, number, tag="cpu-x2")


@pytest.mark.faults
@pytest.mark.parametrize(("group", "phases", "target", "number"), FLOWS)
def test_signals_to_the_flow(
    world: World,
    table: Table,
    moment: random.Random,
    group: str,
    phases: tuple[str, ...],
    target: str,
    number: signal.Signals,
) -> None:
    """With Prefect's temporary server, which must not outlive the flow either."""
    strike_and_recover(world, table, moment, group, phases, target, number)


def strike_and_recover(
    world: World, table: Table, moment: random.Random, group: str, phases: tuple[str, ...], target: str,
    number: signal.Signals, tag: str = "cpu",
) -> None:  # fmt: skip
    """Hit it once in each phase, looking every time for what is left; then let it end, and compare."""
    faults = [table.tried(f"{number.name} of {NAMES[target]}", phase) for phase in phases]
    start = world.flow if target in ("flow", "group") else world.drive
    stages, seconds, num_hits = world.rewind(group, tag), 0.0, 0
    for phase in phases:
        took, hit = strike(world, moment, start, phase, stages, target, number, tag)
        seconds, num_hits = seconds + took, num_hits + hit
        assert all(is_done(one.directory) or not (one.directory / ARTIFACT).exists() for one in stages)
        if not hit:
            break
    began = time.monotonic()
    assert world.finish(start(group, tag)) == 0, world.said()
    seconds += time.monotonic() - began
    world.wait_until_gone()
    world.assert_whole(group, tag)
    assert num_hits == len(phases), f"only {num_hits} of {phases} were hit; the stage ended before"
    for fault in faults:
        fault.seconds_lost, fault.survived = round((seconds - world.seconds[tag, group]) / num_hits, 1), True
    print(f"{group}, {number.name} of {target}: {faults[0].seconds_lost} s lost a hit")


def strike(
    world: World, moment: random.Random, start: Callable[..., Any], phase: str, stages: list[Planned], target: str,
    number: signal.Signals, tag: str,
) -> tuple[float, bool]:  # fmt: skip
    """Start the stages and hit them in that phase: seconds until all of it was gone, and whether it was in time.

    A stage that ended before it could be hit begins anew, and is hit sooner.
    """
    where, (parts, without) = PHASES[phase], TARGETS[target]
    for patience in (1.0, 0.5, 0.1):
        open_ones = [one for one in stages if not is_done(one.directory)] or stages
        # Several models are evaluated by one process, which logs to the first one's directory.
        directory = (open_ones[0] if where.group == "evaluate" else moment.choice(open_ones)).directory
        began = time.monotonic()
        process = start(where.group, tag)
        if wait_for(where.begun(directory, moment), process):
            time.sleep(patience * moment.uniform(0, where.seconds))
            if (victims := world.find(*parts, without=without)) and process.poll() is None:
                if target == "group":
                    os.killpg(process.pid, number)
                else:
                    os.kill(moment.choice(victims), number)
                hit = time.monotonic()
                said = f"{phase}: {number.name} to {target} {time.monotonic() - began:.2f} s after the start"
                code = world.finish(process)
                assert time.monotonic() - hit < SECONDS_TO_END, f"it took {time.monotonic() - hit:.0f} s to end"
                print(f"{said}; exit code {code}, all were gone {world.wait_until_gone():.1f} s later")
                if code != 0:  # else it came too late to matter
                    return time.monotonic() - began, True
        world.finish(process)
        for one in stages:
            shutil.rmtree(one.directory, ignore_errors=True)
    return 0.0, False
