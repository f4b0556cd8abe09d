"""Runs stages for the Prefect tasks: lock, reuse or set aside, order, worker, artifact.

The same steps whichever the stage; the tasks beside this file only say which worker to start. Free of Prefect, so
that it can be called from a plain script too.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from tasks import hub
from tasks.disk import writes_told
from tasks.gpus import booked
from tasks.launch import run_worker
from tasks.oom import OutOfMemory, describe, next_rows, refusal, say_rows, with_rows
from tasks.plan import Planned, changed_inputs, not_computed, output_digest, upstream, why_not_reused
from tasks.stage import ARTIFACT, Order, read_order, read_sound_order, set_aside, stage_lock, write_order

Say = Callable[[str], None]


def compute(stages: Sequence[Planned], module: str, say: Say, force: str = "") -> bool:
    """Bring the stages to their artifacts in one worker process; True when all of them were reused.

    Whether a stage is reused is judged under its lock, so a run that waited for another takes over its result.
    `force` names the request to compute them again though they stand; a second try of it goes on from the first.
    """
    with writes_told(stages[0].directory), ExitStack() as locks:
        descriptors = [locks.enter_context(_lock(planned, say)) for planned in stages]
        todo = [planned for planned in stages if not _reuse(planned, say, force)]
        if not todo:
            return True
        directories = [_order(planned, say, force) for planned in todo]
        stage, how = todo[0].stage, todo[0].order.how
        gpus = locks.enter_context(booked(module, how, str(directories[0]), lambda line: say(f"{stage:<14}{line}")))
        _run_until_it_fits(module, todo, directories, [*descriptors, *gpus], say)
        for directory in directories:
            assert (directory / ARTIFACT).is_file(), f"{module} exited with 0 and left no artifact in {directory}"
    return False


def _run_until_it_fits(
    module: str, todo: Sequence[Planned], directories: Sequence[Path], descriptors: Sequence[int], say: Say
) -> None:
    """Run the worker; where a GPU's memory runs out and `on_oom: retry` says so, again with half the micro-batch."""
    order = read_order(directories[0])
    on_hub = any(_needs_hub(planned.order) for planned in todo)
    while True:
        try:
            return run_worker(module, directories, order.how, forward=say, lock_descriptors=descriptors, hub=on_hub)
        except OutOfMemory as full:
            rows = next_rows(order.how, full.record)
            if rows is None:
                raise refusal(order.stage, full.record, order.how) from None
            tried = [*order.how.get("out_of_memory", []), full.record]
            order = replace(order, how=order.how | with_rows(todo[0].choice, rows) | {"out_of_memory": tried})
            write_order(order, directories[0].parent)
            happened = describe(order.stage, full.record)
            say(f"{order.stage:<14}{happened}; it goes on from its last checkpoint with {say_rows(rows)}")


def _needs_hub(order: Order) -> bool:
    """Whether the config names data of the hub: a source, or a task of lm-eval's own."""
    return bool(order.how.get("hub")) or any("hf" in source for source in order.what.get("sources", {}).values())


def _lock(planned: Planned, say: Say):  # type: ignore[no-untyped-def]  # a context manager over a descriptor
    planned.directory.parent.mkdir(parents=True, exist_ok=True)
    return stage_lock(planned.directory, lambda holder: say(f"{planned.stage:<14}waiting: {holder} is computing it"))


def _reuse(planned: Planned, say: Say, force: str) -> bool:
    reasons = why_not_reused(planned.directory)
    if not reasons and force and _forced_by(planned.directory) != force:
        reasons = ["forced"]
    if not reasons:
        shutil.rmtree(
            planned.directory / "checkpoints", ignore_errors=True
        )  # of a run killed right behind its artifact
        say(f"{planned.stage:<14}reused: {planned.directory}")
        return True
    say(f"{planned.stage:<14}runs: {'; '.join(planned.reasons or reasons)}")
    return False


def _order(planned: Planned, say: Say, force: str) -> Path:
    """Write the order, with the digests of what it reads, once everything it reads stands."""
    runs, directory = planned.directory.parent, planned.directory
    digests = {name: output_digest(path) for name, path in upstream(planned.order, runs).items()}
    if missing := [name for name, digest in digests.items() if not digest]:
        raise not_computed(planned, missing)
    if planned.unfit:
        raise planned.unfit
    _fetch_weights(planned.order, say)
    if (leaves := _leaves_behind(directory, force)) and (aside := set_aside(directory)):
        say(f"{planned.stage:<14}{leaves} stands in {aside}")
    how = {**planned.order.how, **_learned(planned), "input_digests": digests}
    if forced_by := force or _forced_by(directory):
        how["forced_by"] = forced_by
    return write_order(replace(planned.order, how=how), runs)


def _leaves_behind(directory: Path, force: str) -> str:
    """What stands in a stage's directory that the stage does not go on from; empty where it does.

    A forced run goes on from what a forced one began: it may be its retry, after days of training.
    """
    if (directory / ARTIFACT).is_file():
        return "the old one"
    if again := changed_inputs(directory):
        return f"what was begun from another {', '.join(again)}"
    return "what was begun before" if force and not _forced_by(directory) else ""


def _forced_by(directory: Path) -> str:
    """The request that had the stage in `directory` computed again; empty for one that was not forced."""
    order = read_sound_order(directory)
    return str(order.how.get("forced_by", "")) if order else ""


def _learned(planned: Planned) -> dict[str, Any]:
    """The smaller micro-batch that an earlier try on this tag came down to: a stage that is resumed starts with it."""
    now = planned.order.how
    if now.get("on_oom") != "retry" or not (earlier := read_sound_order(planned.directory)):
        return {}
    before = earlier.how
    rows = before.get("microbatch_rows", 0)
    if before.get("tag") != now.get("tag") or not before.get("out_of_memory") or not 0 < rows < now["microbatch_rows"]:
        return {}
    return with_rows(planned.choice, rows) | {"out_of_memory": before["out_of_memory"]}


def _fetch_weights(order: Order, say: Say) -> None:
    model = order.what.get("init") or order.what.get("model") or {}
    if "hub" in model and order.kind != "prepare":
        say(f"{order.stage:<14}fetching {model['hub']} at {model['commit'][:12]}, unless the cache holds it")
        hub.fetch_model(model["hub"], model["commit"], code=order.how.get("trust_remote_code") is True)
