"""Steps that are not finite, or whose loss spikes: refused before the optimizer, or left out."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader, load

from tasks.errors import EXIT_USER_ERROR, UserError
from tasks.stage import read_order
from tasks.training.checkpoint import list_checkpoints, step_of
from tasks.training.health import MIN_STEPS, Health
from tasks.training.loss import StepResult
from tasks.training.metrics import read_metrics
from tasks.training.rows import Layout
from tasks.training.states import STATE
from tests.training.conftest import (
    finish_worker,
    make_documents,
    make_model,
    make_prepared,
    make_stage,
    pack,
    start_worker,
    train_here,
    weights,
)

POISON, BAD_ROW = 127, 22  # a token whose embedding is broken, and the only row that holds it: the sixth step's third
EVERY_STEP = {"every_steps": 1, "every_minutes": None, "keep_last": 20}
SKIP = {"on_nan": "skip", "max_skipped": 2, "checkpoint": EVERY_STEP}
STOP = {"on_nan": "stop", "max_skipped": 2, "checkpoint": EVERY_STEP}


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base model with one broken embedding, and rows of which one holds that token."""
    folder = tmp_path_factory.mktemp("poisoned")
    init = make_model(folder / "model", tied=False)
    tensors = load_file(init / "model.safetensors")
    tensors["model.embed_tokens.weight"][POISON] = math.nan
    save_file(tensors, init / "model.safetensors", {"format": "pt"})
    return init, make_prepared(folder / "prepare_cpt-poisoned", rows_with_poison(BAD_ROW))


def rows_with_poison(*bad: int) -> list[dict[str, list[int]]]:
    """42 rows, of which these hold the broken token."""
    rows = pack(make_documents(120))[:42]
    for number, row in enumerate(rows):
        for column in ("input_ids", "labels"):
            row[column] = [5 if token == POISON else token for token in row[column]]
        if number in bad:
            row["input_ids"][1] = POISON
    return rows


@pytest.fixture(scope="module")
def skipping(tmp_path_factory: pytest.TempPathFactory, poisoned: tuple[Path, Path]) -> Path:
    """A stage that left the broken step out."""
    directory = make_stage(tmp_path_factory.mktemp("runs"), *poisoned, SKIP)
    counts = train_here(directory)
    assert counts["skipped_steps"] == [6] and counts["final_loss"] > 0
    return directory


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, poisoned: tuple[Path, Path]) -> tuple[Path, UserError]:
    """A stage that ended at the broken step, and what it said."""
    directory = make_stage(tmp_path_factory.mktemp("runs"), *poisoned, STOP)
    with pytest.raises(UserError) as caught:
        train_here(directory)
    return directory, caught.value


def saved(directory: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: `model.NAME`, `optimizer.NAME.STATE`."""
    reader = FileSystemReader(directory / "checkpoints" / f"checkpoint-{step:08d}" / STATE)
    kept = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in kept.items()}
    load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit, the broken embedding too."""
    return torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


def test_a_broken_step_ends_the_run_and_names_its_row_and_source(
    stopped: tuple[Path, UserError], poisoned: tuple[Path, Path]
) -> None:
    directory, error = stopped
    assert "step 6 is not finite: loss nan" in error.what and "not touched" in error.what
    source = ["docs", "chats"]
    bad = {source[s] for s in pack(make_documents(120))[BAD_ROW]["seq_sources"]}
    assert f"row {BAD_ROW} of {poisoned[1]}/rows.arrow" in error.where
    assert any(name in error.where for name in bad) and "learning rate" in error.where
    assert "on_nan: skip" in error.todo
    assert step_of(list_checkpoints(directory)[0]) == 5
    assert [line["step"] for line in read_metrics(directory)] == [1, 2, 3, 4, 5]
    assert not (directory / "model").exists()


def test_a_skipped_step_leaves_weights_and_moments_and_the_schedule_goes_on(skipping: Path) -> None:
    before, after, later = (saved(skipping, step) for step in (5, 6, 7))
    assert any(name.endswith("exp_avg_sq") for name in before) and len(before) > 30, "weights and Adam's moments"
    assert all(same(before[name], after[name]) for name in before)
    assert not same(before["model.model.norm.weight"], later["model.model.norm.weight"])
    steps = {int(tensor) for name, tensor in later.items() if name.endswith(".step")}
    assert steps == {6}, "Adam has seen six of the seven steps"
    lines = read_metrics(skipping)
    assert [line["step"] for line in lines] == list(range(1, 12))
    rates = [line["lr"] for line in lines]
    assert rates == sorted(rates[:3]) + sorted(rates[3:], reverse=True) and len(set(rates[2:])) == 9
    assert (lines[5]["loss"], lines[5]["grad_norm"]) == (None, None) and f"row {BAD_ROW}" in lines[5]["skipped"]
    json.dumps(lines, allow_nan=False)  # other readers know no NaN


def test_skipping_goes_on_from_where_a_run_stopped_with_the_same_result(
    skipping: Path, stopped: tuple[Path, UserError]
) -> None:
    directory = stopped[0]
    before = read_order(directory).key
    raw = json.loads((directory / "order.json").read_text())
    (directory / "order.json").write_text(json.dumps(raw | {"how": raw["how"] | SKIP}))
    assert read_order(directory).key == before
    counts = train_here(directory)
    assert counts["resumed_from"] == [5] and counts["skipped_steps"] == [6]
    ours, theirs = weights(directory), weights(skipping)
    assert all(same(ours[name], theirs[name]) for name in theirs)


def test_the_cap_ends_the_run(tmp_path: Path, poisoned: tuple[Path, Path]) -> None:
    prepared = make_prepared(tmp_path / "prepare_cpt-bad", rows_with_poison(0, 8, 16))
    directory = make_stage(tmp_path, poisoned[0], prepared, SKIP)
    with pytest.raises(UserError, match=r"step 5 .* after 2 skipped ones") as caught:
        train_here(directory)
    assert "raise max_skipped" in caught.value.todo
    assert [line["step"] for line in read_metrics(directory) if "skipped" in line] == [1, 3]


def health(microbatch_rows: int = 2, processes: int = 1, **what: float) -> Health:
    return Health(what, {}, Layout(30, 4, microbatch_rows, processes), Path("runs/prepare_cpt-x/rows.arrow"))


def result(loss: float, **by_source: float) -> StepResult:
    return StepResult(loss, by_source or {"docs": loss}, num_tokens=9, num_targets=8, wishes=())


@pytest.mark.parametrize(("loss", "grad_norm"), [(math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)])
def test_neither_loss_nor_gradient_may_be_infinite(loss: float, grad_norm: float) -> None:
    with pytest.raises(UserError, match="step 3 is not finite") as caught:
        health().judge(3, result(loss), grad_norm, 1e-3, [])
    assert "rows 8 to 11 of" in caught.value.where


@pytest.mark.parametrize(("size", "broken", "said"), [
    (1, [2], "row 6 of"), (2, [1], "rows 6 to 7 of"), (1, [0, 3], "rows 4, 7 of"), (3, [1], "row 7 of"),
])  # fmt: skip
def test_the_rows_are_those_of_the_microbatches_that_broke(size: int, broken: list[int], said: str) -> None:
    with pytest.raises(UserError) as caught:
        health(size).judge(2, result(math.nan, docs=2.0, chats=math.nan), 1.0, 1e-3, broken)
    assert caught.value.where.startswith(said) and "sources chats," in caught.value.where


def test_a_step_without_gradient_is_a_fault_of_ours_unless_it_had_no_target() -> None:
    with pytest.raises(AssertionError, match="no gradient"):
        health().judge(1, result(2.0), 0.0, 1e-3, [])
    nothing = StepResult(0.0, {}, num_tokens=9, num_targets=0, wishes=())
    assert health().judge(1, nothing, 0.0, 1e-3, []) == ""


def test_a_spike_is_judged_against_the_median_and_only_where_asked() -> None:
    watched, unwatched = health(max_loss_spike=3.0), health()
    for step in range(1, MIN_STEPS + 1):
        assert watched.judge(step, result(2.0 if step > 1 else 9.0), 1.0, 1e-3, []) == ""
        assert unwatched.judge(step, result(2.0), 1.0, 1e-3, []) == ""
    assert watched.judge(11, result(5.9), 1.0, 1e-3, []) == ""
    assert unwatched.judge(11, result(500.0), 1.0, 1e-3, []) == ""
    with pytest.raises(UserError, match=r"step 12 is a spike: loss 6.1, 3.0 times the usual 2") as caught:
        watched.judge(12, result(6.1, docs=2.0, chats=9.0), 1.0, 1e-3, [])
    assert "docs (loss 2), chats (loss 9)" in caught.value.where


def test_a_spike_ends_a_training_and_keeps_the_checkpoint_before_it(tmp_path: Path, base: Path) -> None:
    """Forty steps of one word, which is soon known, and then a step of many."""
    word = [5] * 19 + [1]
    many = [(ids, ids, 1) for ids, *_ in make_documents(40)]
    rows = pack([(word, word, 0)] * 600)[:160] + pack(many)[:4]
    prepared = make_prepared(tmp_path / "prepare_cpt-spike", rows)
    directory = make_stage(tmp_path, base, prepared, {"checkpoint": EVERY_STEP}, learning_rate=1e-2, max_loss_spike=3.0)
    worker = start_worker(directory)
    assert finish_worker(worker) == EXIT_USER_ERROR, [line["loss"] for line in read_metrics(directory)]
    said = (directory / "worker.log").read_text()
    assert "step 41 is a spike: loss" in said and "rows 160 to 163 of" in said and "chats (loss" in said
    assert [line["step"] for line in read_metrics(directory)] == list(range(1, 41))
    assert (directory / "checkpoints/checkpoint-00000040").is_dir()
    assert not (directory / "artifact.json").exists()
