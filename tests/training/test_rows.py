"""Which rows a step holds, and what a micro-batch looks like."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tasks.errors import UserError
from tasks.training.rows import IGNORE_INDEX, Layout, StepSampler, load_rows, make_collate
from tests.training.conftest import crowded_row, make_documents, pack, write_rows


def steps_of(layout: Layout) -> list[list[int]]:
    """The real rows of each step, in order."""
    numbers = list(StepSampler(layout))
    assert len(numbers) == len(StepSampler(layout))
    slots = layout.slots_per_step
    return [[n for n in numbers[i : i + slots] if n < layout.num_rows] for i in range(0, len(numbers), slots)]


@pytest.mark.parametrize(("microbatch_rows", "world_size"), list(itertools.product((1, 2, 3, 4), (1, 2, 3))))
def test_a_step_holds_the_same_rows_on_any_hardware(microbatch_rows: int, world_size: int) -> None:
    layout = Layout(num_rows=23, rows_per_step=5, microbatch_rows=microbatch_rows, world_size=world_size)
    expected = [list(range(first, min(first + 5, 23))) for first in range(0, 23, 5)]
    assert len(expected[-1]) < 5, "the last step should be a short one"
    assert steps_of(layout) == expected
    assert layout.slots_per_step == layout.accumulation * microbatch_rows * world_size
    assert layout.num_steps == 5


def test_every_micro_batch_of_every_process_has_a_row(tmp_path: Path) -> None:
    layout = Layout(num_rows=3, rows_per_step=4, microbatch_rows=1, world_size=2)
    assert list(StepSampler(layout)) == [0, 1, 2, 3]  # 3 is the filler
    rows = load_rows(write_rows(tmp_path / "rows.arrow", pack(make_documents(9))[:3]), filler_token=1)
    filler = make_collate(lambda lengths: {"document_lengths": tuple(lengths)})([rows[3]])
    assert filler["input_ids"].tolist() == [[1]]
    assert filler["num_tokens"] == 0
    assert filler["targets"].tolist() == []
    assert filler["document_lengths"] == (1,)


def test_a_micro_batch_is_one_flat_row_whose_documents_start_at_zero(tmp_path: Path) -> None:
    packed = pack(make_documents(12))[:2]
    rows = load_rows(write_rows(tmp_path / "rows.arrow", packed), filler_token=1)
    batch = make_collate(lambda lengths: {"document_lengths": tuple(lengths)})([rows[0], rows[1], rows[2]])
    lengths = packed[0]["seq_lengths"] + packed[1]["seq_lengths"]
    assert len(packed[0]["seq_lengths"]) > 1, "a document should start inside a row"
    assert batch["document_lengths"] == tuple(lengths)
    assert batch["position_ids"][0].tolist() == [i for n in lengths for i in range(n)]
    assert batch["input_ids"][0].tolist() == packed[0]["input_ids"] + packed[1]["input_ids"]
    assert batch["num_tokens"] == sum(lengths)


def test_no_document_start_is_predicted_from_the_document_before(tmp_path: Path) -> None:
    packed = [crowded_row()]
    starts = list(itertools.accumulate([0, *packed[0]["seq_lengths"][:-1]]))
    inner = [at for at in starts[1:] if packed[0]["labels"][at] != IGNORE_INDEX]
    assert inner, "an inner document should begin with a label that must be masked"
    rows = load_rows(write_rows(tmp_path / "rows.arrow", packed), filler_token=1)
    batch = make_collate(lambda lengths: {})([rows[0]])
    assert not {at - 1 for at in starts} & set(batch["predict_at"].tolist())
    labels = packed[0]["labels"]
    kept = [at for at in range(len(labels)) if labels[at] != IGNORE_INDEX and at not in starts]
    assert (batch["predict_at"] + 1).tolist() == kept
    assert batch["targets"].tolist() == [labels[at] for at in kept]
    assert int((batch["labels"] != IGNORE_INDEX).sum()) == len(kept)


def test_each_target_knows_its_source(tmp_path: Path) -> None:
    packed = [crowded_row()]
    by_token = [s for s, n in zip(packed[0]["seq_sources"], packed[0]["seq_lengths"], strict=True) for _ in range(n)]
    rows = load_rows(write_rows(tmp_path / "rows.arrow", packed), filler_token=1)
    batch = make_collate(lambda lengths: {})([rows[0]])
    assert batch["target_sources"].tolist() == [by_token[at + 1] for at in batch["predict_at"].tolist()]


def test_missing_and_empty_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_rows(tmp_path / "rows.arrow", filler_token=1)
    with pytest.raises(UserError, match="no row"):
        load_rows(write_rows(tmp_path / "rows.arrow", []), filler_token=1)
