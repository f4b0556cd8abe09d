"""Damage that no signal brings: full and read-only disks, broken checkpoints, lost folders, odd times, changing data, two at once."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.stage import is_done, read_artifact
from tests.conftest import laws, write_lines
from tests.faults.table import Fault, Table
from tests.faults.test_signals import PHASES, TARGETS
from tests.faults.world import World, num_steps, wait_for

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]
MEGABYTE = 1_000_000


def recover(world: World, fault: Fault, group: str, began: float) -> None:
    """The same command completes, and all is as if nothing had been."""
    assert world.finish(world.drive(group)) == 0, world.said()
    world.wait_until_gone()
    world.assert_whole(group)
    fault.seconds_lost = round(time.monotonic() - began - world.seconds["cpu", group], 1)
    fault.survived = True


def interrupted_training(world: World, moment: random.Random) -> Path:
    """A CPT that was killed with two checkpoints behind it; its directory."""
    [planned] = world.rewind("cpt")
    process = world.drive("cpt")
    wanted = moment.randint(25, 100)
    assert wait_for(lambda: num_steps(planned.directory) >= wanted, process)
    for pid in world.find(*TARGETS["worker"][0], without=TARGETS["worker"][1]):
        os.kill(pid, signal.SIGKILL)
    assert world.finish(process) != 0
    world.wait_until_gone()
    return planned.directory


# --- checkpoints, folders ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log", ["metrics.jsonl", "resumed_from.json"])
@pytest.mark.parametrize("harm", ["truncated", "one bit flipped", "a file lost"])
def test_a_damaged_log_beside_whole_checkpoints(
    world: World, table: Table, moment: random.Random, log: str, harm: str
) -> None:
    fault = table.tried("damaged log", f"{log}: {harm}")
    began = time.monotonic()
    directory = interrupted_training(world, moment)
    newest = max(directory.glob("checkpoints/checkpoint-*"))
    earlier = [1, 2]
    (directory / "resumed_from.json").write_text(f"{earlier}\n")
    damage(directory / log, harm, moment)
    recover(world, fault, "cpt", began)
    assert "is damaged" not in (directory / "worker.log").read_text()
    resumed = read_artifact(directory)["counts"]["resumed_from"]
    assert resumed[-1] == int(newest.name[-8:])
    assert log == "resumed_from.json" or resumed[:-1] == earlier


def damage(file: Path, harm: str, moment: random.Random) -> None:
    content = bytearray(file.read_bytes())
    if harm == "truncated":
        del content[moment.randrange(len(content)) :]
    else:
        content[moment.randrange(len(content))] ^= 1 << moment.randrange(8)
    stat = file.stat()
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # a disk that rots leaves no trace in the times
    if harm == "a file lost":
        file.unlink()


@pytest.mark.parametrize("harm", ["truncated", "one bit flipped", "a file lost", "all of them damaged"])
def test_a_damaged_checkpoint(world: World, table: Table, moment: random.Random, harm: str) -> None:
    fault = table.tried(
        f"checkpoint {harm}" if harm != "all of them damaged" else "all checkpoints damaged", "training"
    )
    began = time.monotonic()
    directory = interrupted_training(world, moment)
    checkpoints = sorted(directory.glob("checkpoints/checkpoint-*"))
    assert len(checkpoints) == 2
    for checkpoint in checkpoints if harm == "all of them damaged" else checkpoints[-1:]:
        file = moment.choice(
            [
                path
                for path in checkpoint.rglob("*")
                if path.is_file() and path.stat().st_size and path.name != "digests.json"
            ]
        )
        damage(file, harm, moment)
    recover(world, fault, "cpt", began)
    log = (directory / "worker.log").read_text()
    assert "is damaged" in log and "falling back to the one before" in log
    resumed = read_artifact(directory)["counts"]["resumed_from"]
    assert resumed == ([] if harm == "all of them damaged" else [int(checkpoints[0].name[-8:])])


@pytest.mark.parametrize("when", ["before", "while it is computed"])
def test_a_stage_folder_is_deleted(world: World, table: Table, moment: random.Random, when: str) -> None:
    fault = table.tried("stage folder deleted", when)
    [planned] = world.rewind("cpt")
    began = time.monotonic()
    if when == "before":
        lost = world.plan()["prepare_cpt"].directory
        shutil.rmtree(lost)
        assert world.finish(world.drive("cpt")) == 2 and "has not been computed" in world.said()
        assert world.finish(world.drive("prepare")) == 0, world.said()
    else:
        process = world.drive("cpt")
        wanted = moment.randint(5, 100)
        assert wait_for(lambda: num_steps(planned.directory) >= wanted, process)
        while planned.directory.exists():  # the worker may be making a file in it
            shutil.rmtree(planned.directory, ignore_errors=True)
        assert world.finish(process) != 0, "a run whose folder is gone cannot be done"
        world.wait_until_gone()
        assert len(world.said()) > 20
    recover(world, fault, "cpt", began)


# --- disks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(world: World, request: pytest.FixtureRequest) -> Iterator[Path]:
    """`runs/` on a disk of its own, a tmpfs whose size the test chooses."""
    world.need(request.node.callspec.params.get("group", "cpt"), "cpu")  # before the disk covers the folder
    shutil.rmtree(world.runs, ignore_errors=True)
    world.runs.mkdir()
    if os.geteuid() != 0 or mount("-t", "tmpfs", "-o", "size=64m", "steep", str(world.runs)):
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        yield world.runs
    finally:
        subprocess.run(["umount", "-l", str(world.runs)], check=True)


def mount(*arguments: str) -> int:
    return subprocess.run(["mount", *arguments], check=False, capture_output=True).returncode


def fill(world: World, group: str) -> int:
    """Put on the disk what stands before a group; bytes in use."""
    for path in world.runs.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for planned in world.plan().values():
        if world.order(planned.group) < world.order(group):
            shutil.copytree(world.project / "reference-cpu" / planned.directory.name, planned.directory,
                            copy_function=shutil.copy2)  # fmt: skip
    return used(world.runs)


def bytes_needed(world: World, group: str) -> int:
    """What a group leaves on the disk; measured once."""
    if group not in world.bytes_needed:
        before = fill(world, group)
        assert world.finish(world.drive(group)) == 0, world.said()
        world.bytes_needed[group] = used(world.runs) - before
    return world.bytes_needed[group]


def used(path: Path) -> int:
    usage = shutil.disk_usage(path)
    return usage.total - usage.free


SWEEP = {"prepare": 5, "evaluate": 3, "report": 3}


@pytest.mark.parametrize(
    ("group", "number"), [(group, number) for group, count in SWEEP.items() for number in range(count)]
)
def test_the_disk_is_full(
    world: World, table: Table, moment: random.Random, disk: Path, group: str, number: int
) -> None:
    """So many bytes are left when the stage begins; every write may be the one that does not fit."""
    fault = table.tried("disk full", group)
    needs = bytes_needed(world, group)
    share = (number + moment.random()) / SWEEP[group]  # the sweep covers all of it
    fill(world, group)
    left = int(needs * share * 0.97)
    began = time.monotonic()
    leave(disk, left)
    code = world.finish(world.drive(group))
    print(f"{left:,} of {needs:,} bytes were left")
    if code or share < 0.5:  # what is cleared before the end (a folder of work) was counted too
        assert_refused(world, group, code)
    (disk / "ballast").unlink()
    recover(world, fault, group, began)


@pytest.mark.parametrize("phase", ["training", "training ", "checkpointing", "exporting"])
def test_the_disk_becomes_full_in_training(
    world: World, table: Table, moment: random.Random, disk: Path, phase: str
) -> None:
    """Somebody else fills it. (A training that begins on so full a disk is refused before its first step.)"""
    fault = table.tried("disk full", phase.strip())
    directory = world.plan()["cpt"].directory
    for _ in range(4):  # an export of so small a model takes 30 ms: it may be over before anybody sees it
        fill(world, "cpt")
        began = time.monotonic()
        process = world.drive("cpt")
        assert wait_for(lambda: num_steps(directory) >= 1, process)
        worker = world.find(*TARGETS["worker"][0], without=TARGETS["worker"][1])
        assert worker and wait_for(PHASES[phase.strip()].begun(directory, moment), process)
        with stopped(worker):
            leave(disk, 0 if phase == "exporting" else moment.choice([0, 4096, moment.randint(0, 200_000)]))
        if code := world.finish(process):
            break
    assert_refused(world, "cpt", code)
    (disk / "ballast").unlink()
    recover(world, fault, "cpt", began)


@contextlib.contextmanager
def stopped(pids: list[int]) -> Iterator[None]:
    """The processes stand still meanwhile: filling a disk takes longer than what they do in some phases."""
    with contextlib.suppress(ProcessLookupError):
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            for pid in pids:
                os.kill(pid, signal.SIGCONT)


def leave(disk: Path, num_bytes: int) -> None:
    """Fill the disk but for so many bytes, while others may be writing."""
    with contextlib.suppress(OSError):
        (disk / "ballast").write_bytes(bytes(max(0, shutil.disk_usage(disk).free - num_bytes)))


def assert_refused(world: World, group: str, code: int) -> None:
    """One message, no traceback, no stage that looks done."""
    world.wait_until_gone()
    said = world.said()
    assert code == 2 and "Traceback" not in said, said[-3000:]
    assert "the disk is full" in said or "the disk is too small" in said, said[-3000:]
    assert not all(is_done(one.directory) for one in world.stages(group))


@pytest.mark.parametrize("group", ["prepare", "cpt", "evaluate"])
def test_the_runs_folder_is_read_only(world: World, table: Table, disk: Path, group: str) -> None:
    fault = table.tried("runs folder read-only", group)
    fill(world, group)
    assert mount("-o", "remount,ro", str(world.runs)) == 0
    began = time.monotonic()
    try:
        assert world.finish(world.drive(group)) == 2, world.said()
        assert "nothing can be written" in world.said() and "Read-only file system" in world.said()
        assert "Traceback" not in world.said() and len(world.said().splitlines()) < 12
    finally:
        assert mount("-o", "remount,rw", str(world.runs)) == 0
    recover(world, fault, group, began)


@pytest.mark.parametrize("group", ["cpt"])
def test_the_disk_becomes_read_only(world: World, table: Table, moment: random.Random, disk: Path, group: str) -> None:
    """What a kernel does to a disk that fails: what is open stays open, every path from now on is refused."""
    fault = table.tried("disk becomes read-only", "training")
    fill(world, group)
    directory = world.plan()["cpt"].directory
    began = time.monotonic()
    process = world.drive("cpt")
    wanted = moment.randint(12, 100)
    assert wait_for(lambda: num_steps(directory) >= wanted, process)
    # The disk itself cannot be remounted while a log is open for writing; a second view of it, laid over the first, can.
    assert mount("--bind", str(world.runs), str(world.runs)) == 0
    try:
        assert mount("-o", "remount,bind,ro", str(world.runs)) == 0
        code = world.finish(process)
    finally:
        subprocess.run(["umount", "-l", str(world.runs)], check=True)
    assert code == 2 and "Traceback" not in world.said(), world.said()
    assert "Read-only file system" in world.said(), world.said()
    recover(world, fault, "cpt", began)


# --- clocks, data, company --------------------------------------------------------------------------------------------


CLOCK = """
import os, time
from pathlib import Path
real, jumped, seen = time.time, Path(os.environ["CLOCK_JUMPED"]), Path(os.environ["CLOCK_SEEN"])
def now():
    if not jumped.exists():
        return real()
    seen.touch()
    return real() + float(os.environ["CLOCK_SECONDS"])
time.time, time.time_ns = now, lambda: int(now() * 1e9)
"""


@pytest.mark.parametrize("hours", [-24 * 365, 24 * 365])
def test_the_clock_jumps(world: World, table: Table, moment: random.Random, tmp_path: Path, hours: int) -> None:
    """In Python, of every process of a run: the machine's own serves others, and libfaketime breaks `time.sleep`."""
    fault = table.tried("the clock jumps by a year", "training")
    began = time.monotonic()
    (tmp_path / "sitecustomize.py").write_text(CLOCK)
    [planned] = world.rewind("cpt")
    jumped, seen = tmp_path / "jumped", tmp_path / "seen"
    process = world.drive("cpt", PYTHONPATH=str(tmp_path), CLOCK_JUMPED=str(jumped), CLOCK_SEEN=str(seen),
                          CLOCK_SECONDS=str(hours * 3600))  # fmt: skip
    wanted = moment.randint(25, 100)
    assert wait_for(lambda: num_steps(planned.directory) >= wanted, process) and not seen.exists()
    jumped.touch()
    assert world.finish(process) == 0, world.said()
    assert seen.exists(), "somebody asked for the time"
    world.wait_until_gone()
    recover(world, fault, "cpt", began)
    lines = (planned.directory / "metrics.jsonl").read_text().splitlines()
    assert all('"seconds": -' not in line for line in lines)


@pytest.mark.parametrize("hours", [-24 * 365, 24 * 365])
def test_files_are_of_another_year(world: World, table: Table, moment: random.Random, hours: int) -> None:
    """As after a clock that was set between two runs."""
    fault = table.tried("file times a year ahead or back", "between two runs")
    began = time.monotonic()
    interrupted_training(world, moment)
    for path in [world.config, *world.project.glob("*.jsonl"), *world.runs.rglob("*")]:
        stat = path.stat()
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + hours * 3600 * 10**9))
    recover(world, fault, "cpt", began)
    plan = world.plan()
    assert plan["prepare_cpt"].reused and plan["cpt"].reused
    lines = (plan["cpt"].directory / "metrics.jsonl").read_text().splitlines()
    assert all('"seconds": -' not in line for line in lines)


@pytest.mark.parametrize("change", ["a line more", "the same size", "cut off", "deleted"])
def test_data_changes_while_it_is_read(world: World, table: Table, moment: random.Random, change: str) -> None:
    fault = table.tried("data file changed while being read", change)
    world.rewind("prepare")
    data, directory = world.project / "laws.jsonl", world.plan()["prepare_cpt"].directory
    before = data.read_bytes()
    began = time.monotonic()
    try:
        process = world.drive("prepare")
        assert wait_for((directory / "work").exists, process)
        time.sleep(moment.uniform(0, 0.1))
        if change == "a line more":
            with data.open("ab") as file:
                file.write(b'{"text": "Article 9999. A law that came late, and is long enough."}\n')
        elif change == "cut off":
            os.truncate(data, before.index(b"\n", len(before) // 2) + 1)
        elif change == "deleted":
            data.unlink()
        else:
            data.write_bytes(before.replace(b"A bank keeps", b"A bank hides", 1))
        assert world.finish(process) == 2, world.said()
        assert (
            "changed after this run was planned" in world.said()
            or "when this run was planned" in world.said()
            or f"no such file: {data}" in world.said()
        ) and str(data) in world.said()
        if change != "deleted":
            assert world.plan()["prepare_cpt"].directory != directory, "other data is another stage"
            assert world.finish(world.drive("prepare")) == 0, world.said()
    finally:
        data.write_bytes(before)
    recover(world, fault, "prepare", began)


def test_two_runs_of_one_config_at_once(world: World, table: Table) -> None:
    fault = table.tried("two runs of one config at once", "prepare and CPT")
    world.rewind("prepare")
    began = time.monotonic()
    first = world.drive("prepare cpt")
    said = (world.project / "said.txt").rename(world.project / "said-first.txt")
    second = world.drive("prepare cpt")
    assert [world.finish(first), world.finish(second)] == [0, 0], world.said() + said.read_text()
    both = said.read_text() + world.said()
    for stage in ("prepare_cpt", "prepare_sft", "cpt"):
        assert both.count(f"{stage:<14}runs:") == 1 and both.count(f"{stage:<14}reused:") == 1, both
    assert "is computing it" in both
    world.wait_until_gone()
    world.assert_whole("prepare")
    world.assert_whole("cpt")
    fault.seconds_lost = round(
        time.monotonic() - began - world.seconds["cpu", "prepare"] - world.seconds["cpu", "cpt"], 1
    )
    fault.survived = True


def test_new_data_beside_the_old_runs_what_reads_it(world: World, table: Table) -> None:
    """A file that is added between two runs: another key, and nothing of the old one is touched."""
    fault = table.tried("a file added between two runs", "prepare")
    world.rewind("cpt")
    old = world.plan()["prepare_cpt"].directory
    before = {path: path.stat().st_mtime_ns for path in old.rglob("*")}
    write_lines(world.project / "laws2.jsonl", laws(50, first=9000))
    try:
        assert world.finish(world.drive("prepare")) == 0, world.said()
        assert world.plan()["prepare_cpt"].directory != old
        assert {path: path.stat().st_mtime_ns for path in old.rglob("*")} == before
    finally:
        (world.project / "laws2.jsonl").unlink()
    fault.survived = True
