"""The worker as a real process: killed, stopped, resumed, started twice, spread over two processes.

Starting a worker costs 6 CPU seconds, so each story kills one run several times, and the stories run side by side.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from tasks import launch
from tasks.errors import EXIT_PREEMPTED, EXIT_USER_ERROR
from tasks.launch import WorkerFailed
from tasks.stage import ARTIFACT, file_sha256, finish, is_done, read_artifact, read_order, write_order
from tasks.training.checkpoint import FOLDER, list_checkpoints, step_of, writing_folder
from tasks.training.metrics import read_metrics
from tasks.training.states import STATE
from tests.training.conftest import (
    SEQ_LEN,
    finish_worker,
    largest_difference,
    make_documents,
    make_prepared,
    make_stage,
    num_lines,
    pack,
    run_worker,
    start_worker,
    train_here,
    wait_until,
    weights,
)

NUM_STEPS, ROWS_PER_STEP_SHARDED = 120, 3
EVERY_10 = {"checkpoint": {"every_steps": 10, "every_minutes": None, "keep_last": 2}}


def kill(worker: subprocess.Popen[bytes]) -> None:
    os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def killed_by_sigkill(directory: Path) -> Path:
    """Killed while saving, between two saves, and while exporting; then finished by one of two workers."""
    saving = writing_folder(directory) / "checkpoint-20"
    worker = start_worker(directory)
    wait_until((saving / STATE).exists, worker)
    kill(worker)
    assert saving.exists() and [step_of(path) for path in list_checkpoints(directory)] == [10]

    worker = start_worker(directory)
    wait_until(lambda: num_lines(directory) >= 53, worker)
    kill(worker)
    assert num_lines(directory) % 10, "this kill should fall between two saves"
    assert 50 <= step_of(list_checkpoints(directory)[0]) < num_lines(directory)

    worker = start_worker(directory)
    wait_until((directory / ".model.writing").exists, worker)
    kill(worker)
    assert (directory / ".model.writing").exists() and not is_done(directory)

    both = [start_worker(directory), start_worker(directory)]
    assert [finish_worker(one) for one in both] == [0, 0]
    return directory


def stopped_by_signals(directory: Path) -> Path:
    """SIGTERM, then SIGINT; then the newest checkpoint loses its tail."""
    for number, more in ((signal.SIGTERM, 15), (signal.SIGINT, 20)):
        worker = start_worker(directory)
        reached = (step_of(list_checkpoints(directory)[0]) if list_checkpoints(directory) else 0) + more
        wait_until(lambda enough=reached: num_lines(directory) >= enough, worker)
        steps_when_told = num_lines(directory)
        worker.send_signal(number)
        assert finish_worker(worker) == EXIT_PREEMPTED
        saved = step_of(list_checkpoints(directory)[0])
        assert saved == num_lines(directory) < NUM_STEPS
        # Two: the step under way, and one more that this test was too slow to see.
        assert saved <= steps_when_told + 2
        assert (directory / "preempted.txt").exists()
    assert len(list_checkpoints(directory)) == 2
    shard = list_checkpoints(directory)[0] / STATE / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert run_worker(directory) == 0
    return directory


def refused(directory: Path) -> Path:
    """Rows longer than the model's positions."""
    assert run_worker(directory) == EXIT_USER_ERROR
    return directory


def moved_between_sizes(directory: Path) -> Path:
    """Two processes with FSDP2, stopped through torchrun; taken over by one, stopped; finished by two again."""
    order = read_order(directory)
    for processes, enough in ((2, 8), (1, 20)):
        write_order(replace(order, how=order.how | {"processes": processes}), directory.parent)
        worker = start_worker(directory, processes)
        wait_until(lambda enough=enough: num_lines(directory) >= enough, worker)
        worker.terminate()
        assert finish_worker(worker) != 0
        assert (directory / "preempted.txt").exists(), "torchrun hides exit code 75; this file tells"
        newest = list_checkpoints(directory)[0]
        assert enough <= step_of(newest) < NUM_STEPS // ROWS_PER_STEP_SHARDED
        assert len(list((newest / STATE).glob("*.distcp"))) == processes
    write_order(order, directory.parent)
    assert run_worker(directory, processes=2) == 0
    return directory


def begun_from_another_base(directory: Path) -> Path:
    """The base is another one when the worker begins, then becomes one while it trains; at last it is the old one."""
    weights_file = Path(read_order(directory).inputs["init"]) / "model.safetensors"
    planned = weights_file.read_bytes()

    def replace_by(content: bytes) -> None:
        aside = weights_file.with_name(".aside")
        aside.write_bytes(content)
        aside.replace(weights_file)

    another = planned[:-1] + bytes([planned[-1] ^ 1])
    replace_by(another)
    assert run_worker(directory) == EXIT_USER_ERROR and num_lines(directory) == 0
    assert f"{weights_file} changed after this run was planned" in (directory / "error.txt").read_text()
    replace_by(planned)
    worker = start_worker(directory)
    wait_until(lambda: num_lines(directory) >= 1, worker)
    replace_by(another)
    assert finish_worker(worker) == EXIT_USER_ERROR and num_lines(directory) == NUM_STEPS and not is_done(directory)
    replace_by(planned)
    assert run_worker(directory) == 0
    return directory


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 packed rows."""
    return make_prepared(tmp_path_factory.mktemp("long") / "prepare_cpt-long", pack(make_documents(400))[:120])


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory, base: Path, long_rows: Path) -> Iterator[dict[str, Future[Any]]]:
    """All stories, running side by side; `result()` raises where one went wrong."""
    runs = tmp_path_factory.mktemp("runs")
    one_row = {"batch_tokens": SEQ_LEN}
    killed = make_stage(runs / "killed", base, long_rows, EVERY_10, **one_row)
    stopped = make_stage(runs / "stopped", base, long_rows, EVERY_10, **one_row)
    sharded = make_stage(
        runs / "sharded", base, long_rows, {"processes": 2}, batch_tokens=ROWS_PER_STEP_SHARDED * SEQ_LEN
    )
    too_long = make_stage(runs / "too_long", base, long_rows, seq_len=129, batch_tokens=129)
    shutil.copytree(base, runs / "base")
    named = read_order(make_stage(runs / "unnamed", runs / "base", long_rows, **one_row))
    init = {"model.safetensors": file_sha256(runs / "base" / "model.safetensors")}
    replaced = write_order(replace(named, what=named.what | {"init": init}), runs / "replaced")
    with ThreadPoolExecutor(3) as pool:
        yield {
            "sharded": pool.submit(moved_between_sizes, sharded),
            "killed": pool.submit(killed_by_sigkill, killed),
            "stopped": pool.submit(stopped_by_signals, stopped),
            "refused": pool.submit(refused, too_long),
            "replaced": pool.submit(begun_from_another_base, replaced),
        }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, base: Path, long_rows: Path) -> Path:
    """The same stage, trained at once."""
    directory = make_stage(tmp_path_factory.mktemp("runs"), base, long_rows, batch_tokens=SEQ_LEN)
    train_here(directory)
    return directory


def assert_same(directory: Path, reference: Path) -> None:
    """Weights and losses bit for bit, every step once, and nothing left behind."""
    ours, theirs = weights(directory), weights(reference)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    lines, expected = read_metrics(directory), read_metrics(reference)
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    for name in ("loss", "lr", "grad_norm", "tokens", "loss_by_source"):
        assert [line[name] for line in lines] == [line[name] for line in expected]
    assert is_done(directory)
    assert {path.name for path in directory.iterdir()} <= {
        "order.json", "artifact.json", "model", "metrics.jsonl", "tensorboard", "worker.log", "resumed_from.json",
    }  # fmt: skip


def test_sigkill_while_saving_training_or_exporting_changes_no_bit(
    stories: dict[str, Future[Any]], uninterrupted: Path
) -> None:
    directory = stories["killed"].result()
    assert_same(directory, uninterrupted)
    resumed_from = read_artifact(directory)["counts"]["resumed_from"]
    assert resumed_from[0] == 10 and resumed_from[-1] == NUM_STEPS and len(resumed_from) == 3


def test_of_two_workers_one_waits_and_says_for_whom(stories: dict[str, Future[Any]]) -> None:
    log = (stories["killed"].result() / "worker.log").read_text()
    assert log.count("is being computed by") == 1
    assert log.count("done: loss") == 1


def test_signals_save_within_a_step_and_a_damaged_checkpoint_is_skipped(
    stories: dict[str, Future[Any]], uninterrupted: Path
) -> None:
    directory = stories["stopped"].result()
    assert_same(directory, uninterrupted)
    assert len(read_artifact(directory)["counts"]["resumed_from"]) == 2
    log = (directory / "worker.log").read_text()
    assert "is damaged (state/__0_0.distcp holds" in log and "falling back" in log


def test_two_processes_then_one_then_two_give_the_result_of_one(
    stories: dict[str, Future[Any]], base: Path, long_rows: Path, tmp_path: Path
) -> None:
    single = make_stage(tmp_path, base, long_rows, batch_tokens=ROWS_PER_STEP_SHARDED * SEQ_LEN)
    train_here(single)
    directory = stories["sharded"].result()
    counts = read_artifact(directory)["counts"]
    assert counts["wrapper"] == "FSDP2" and len(counts["resumed_from"]) == 2
    assert largest_difference(directory, single) < 1e-4
    losses = [[line["loss"] for line in read_metrics(one)] for one in (directory, single)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert [line["tokens"] for line in read_metrics(directory)] == [line["tokens"] for line in read_metrics(single)]
    model = AutoModelForCausalLM.from_pretrained(directory / "model")
    assert type(model).__name__ == "LlamaForCausalLM" and model.config.architectures == ["LlamaForCausalLM"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, weights(directory)["model.embed_tokens.weight"])


def test_bad_input_ends_with_a_message_and_no_half_made_stage(stories: dict[str, Future[Any]]) -> None:
    directory = stories["refused"].result()
    assert "seq_len is 129, but the model has 128 positions" in (directory / "error.txt").read_text()
    assert {path.name for path in directory.iterdir()} == {"order.json", "error.txt", "worker.log"}
    assert not (directory / FOLDER).exists()


def test_a_base_that_is_replaced_gives_no_result_under_the_key_of_the_old(
    stories: dict[str, Future[Any]], uninterrupted: Path
) -> None:
    directory = stories["replaced"].result()
    assert is_done(directory) and largest_difference(directory, uninterrupted) == 0


def test_a_done_stage_returns_at_once(stories: dict[str, Future[Any]]) -> None:
    directory = stories["killed"].result()
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.name != "worker.log"}
    assert run_worker(directory) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_done_stage_that_was_damaged_is_stopped_like_any_other(tmp_path: Path, base: Path, long_rows: Path) -> None:
    directory = make_stage(tmp_path, base, long_rows, batch_tokens=SEQ_LEN)
    (directory / "model").mkdir()
    (directory / "model/model.safetensors").write_text("weights")
    finish(directory, ["model"], {}, 1.0)
    shutil.rmtree(directory / "model")
    worker = start_worker(directory)
    wait_until(lambda: num_lines(directory) >= 3, worker)
    worker.terminate()
    assert finish_worker(worker) == EXIT_PREEMPTED
    assert step_of(list_checkpoints(directory)[0]) == num_lines(directory) < NUM_STEPS
    assert not (directory / ARTIFACT).exists(), "a run that goes on would set the checkpoints aside with it"


def test_of_several_processes_the_one_that_died_first_is_told(tmp_path: Path, base: Path, long_rows: Path) -> None:
    """Not the one that lost its connection to it, whose traceback stands further down in the log."""
    directory = make_stage(tmp_path, base, long_rows, {"processes": 2}, batch_tokens=ROWS_PER_STEP_SHARDED * SEQ_LEN)

    def kill_second() -> None:
        while not num_lines(directory):
            time.sleep(0.05)
        [rank] = [one for one in psutil.Process().children(recursive=True) if one.environ().get("RANK") == "1"]
        rank.kill()

    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(kill_second)
        with pytest.raises(WorkerFailed) as caught:
            launch.run_worker("tasks.training", [directory], read_order(directory).how, forward=print)
        killed.result(0)
    said = caught.value.tail[-8:]  # behind them a line of "="
    assert any(re.search(r"rank +: 1 ", line) for line in said) and any("SIGKILL" in line for line in said), said
