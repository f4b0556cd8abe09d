"""Signals at random moments: afterwards the same command completes, bit for bit, and nothing of ours is left.

One case: the pipeline stands right before a stage; the stage is started, hit in one of its phases, and started again.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tasks.stage import ARTIFACT, is_done
from tests.faults.table import Table
from tests.faults.world import World, wait_for

TERM, INT, KILL = signal.SIGTERM, signal.SIGINT, signal.SIGKILL
# How each target's command line is known. The worker under torchrun is a rank.
TARGETS = {
    "worker": (("-m tasks.",), ("guard.py", "torch.distributed.run")),
    "starter": (("tests.faults.drive",), ("guard.py",)),
    "flow": (("-m flows.pipeline",), ("guard.py",)),
    "guard": (("guard.py",), ()),
    "torchrun": (("torch.distributed.run",), ("guard.py",)),
    "rank": (("-m tasks.training",), ("guard.py", "torch.distributed.run")),
}
NAMES = {"worker": "the worker (trainer, tokenizer, evaluator)", "starter": "whoever started the stage", "flow": "the flow's process",
         "guard": "the guard", "torchrun": "torchrun", "rank": "one rank of two"}  # fmt: skip
STEPS, WARMUP = 128, 26


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
    wanted, folder = moment.randrange(10, STEPS, 10), directory / "checkpoints" / ".writing"
    return (folder / f"checkpoint-{wanted}").exists


def num_steps(directory: Path) -> int:
    metrics = directory / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


PHASES = {
    "starting": Phase("cpt", exists("worker.log"), 6.0),
    "tokenizing": Phase("prepare", exists("work"), 0.3),
    "packing": Phase("prepare", exists("work/rows.arrow"), 0.02),
    "warm-up": Phase("cpt", steps(1, WARMUP - 2), 0.0),
    "training": Phase("cpt", steps(WARMUP, STEPS - 8), 0.0),
    "checkpointing": Phase("cpt", saving, 0.02),
    "exporting": Phase("cpt", says("exporting the model"), 0.03),
    "evaluating": Phase("evaluate", exists("worker.log"), 9.0),
    "reporting": Phase("report", exists("worker.log"), 1.2),
}


def cases(targets: dict[str, tuple[signal.Signals, ...]], phases: list[str]) -> list[object]:
    return [
        pytest.param(phase, target, number, id=f"{phase}-{target}-{number.name}")
        for phase in phases for target, numbers in targets.items() for number in numbers
    ]  # fmt: skip


QUICK = [
    pytest.param("packing", "worker", KILL, id="quick-packing-worker-SIGKILL"),
    pytest.param("training", "starter", KILL, id="quick-training-starter-SIGKILL"),
    pytest.param("checkpointing", "worker", TERM, id="quick-checkpointing-worker-SIGTERM"),
]
ALL_SIGNALS = {"worker": (TERM, INT, KILL), "starter": (TERM, INT, KILL)}


@pytest.mark.parametrize(("phase", "target", "number"), QUICK)
def test_a_signal_now_and_then(
    world: World, table: Table, moment: random.Random, phase: str, target: str, number: signal.Signals
) -> None:
    strike_and_recover(world, table, moment, phase, target, number)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("phase", "target", "number"),
    [*cases(ALL_SIGNALS, list(PHASES)), *cases({"guard": (KILL,)}, ["warm-up", "training", "evaluating"])],
)
def test_a_signal_at_a_random_moment(
    world: World, table: Table, moment: random.Random, phase: str, target: str, number: signal.Signals
) -> None:
    strike_and_recover(world, table, moment, phase, target, number)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("phase", "target", "number"),
    [
        *cases({"torchrun": (TERM, KILL), "rank": (KILL,)}, ["starting", "training", "checkpointing", "exporting"]),
        *cases({"torchrun": (INT,), "rank": (TERM,), "starter": (KILL,)}, ["training"]),
    ],
)
def test_a_signal_to_one_of_several_processes(
    world: World, table: Table, moment: random.Random, phase: str, target: str, number: signal.Signals
) -> None:
    strike_and_recover(world, table, moment, phase, target, number, tag="cpu-x2")


@pytest.mark.faults
@pytest.mark.parametrize(
    ("phase", "target", "number"),
    [
        *cases({"flow": (TERM, KILL)}, ["tokenizing", "training", "evaluating"]),
        *cases({"flow": (INT,)}, ["exporting", "reporting"]),
    ],
)
def test_a_signal_to_the_flow(
    world: World, table: Table, moment: random.Random, phase: str, target: str, number: signal.Signals
) -> None:
    """With Prefect's temporary server, which must not outlive the flow either."""
    strike_and_recover(world, table, moment, phase, target, number)


def strike_and_recover(
    world: World, table: Table, moment: random.Random, phase: str, target: str, number: signal.Signals, tag: str = "cpu"
) -> None:
    """Hit it, look for what is left, run it again, and compare."""
    fault = table.tried(f"{number.name} of {NAMES[target]}", phase)
    group, start = PHASES[phase].group, world.flow if target == "flow" else world.drive
    seconds_first = strike(world, moment, phase, target, number, tag)
    [done_or_not] = {is_done(p.directory) or not (p.directory / ARTIFACT).exists() for p in world.stages(group)}
    assert done_or_not, "a stage has an artifact that does not hold"
    again = time.monotonic()
    assert world.finish(start(group, tag)) == 0, world.said()
    seconds_again = time.monotonic() - again
    world.wait_until_gone()
    world.assert_whole(group, tag)
    fault.seconds_lost = round(seconds_first + seconds_again - world.seconds[tag, group], 1)
    fault.survived = True
    print(f"{phase}, {number.name} of {target}: {fault.seconds_lost} s lost")


def strike(world: World, moment: random.Random, phase: str, target: str, number: signal.Signals, tag: str) -> float:
    """Start the stage and hit it in that phase; seconds until all of it was gone. Tries again with a shorter wait."""
    where = PHASES[phase]
    for patience in (1.0, 0.5, 0.1):
        directory = moment.choice(world.rewind(where.group, tag)).directory
        began = time.monotonic()
        process = (world.flow if target == "flow" else world.drive)(where.group, tag)
        if wait_for(where.begun(directory, moment), process):
            time.sleep(patience * moment.uniform(0, where.seconds))
            parts, without = TARGETS[target]
            if (victims := world.find(*parts, without=without)) and process.poll() is None:
                os.kill(moment.choice(victims), number)
                print(f"hit {time.monotonic() - began:.2f} s after the start")
                world.finish(process)
                print(f"all were gone {world.wait_until_gone():.1f} s after the command's end")
                return time.monotonic() - began
        world.finish(process)
    raise AssertionError(f"three runs of {where.group} ended before they could be hit in {phase}")
