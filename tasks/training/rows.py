"""Packed rows on their way to the model: `rows.arrow` -> which rows a step holds -> one micro-batch of tensors.

The order of the rows was fixed when they were prepared, so the sampler is sequential and step `s` holds the
rows `[s * rows_per_step, (s + 1) * rows_per_step)`, however they are spread over micro-batches and
processes. Where a step does not divide, filler rows (one token without a target) stand in: nothing repeats
and no process starves.

A micro-batch is one flat row: its rows behind each other, positions counted from 0 in each document. A
document's first token has no target, because nothing of its own document stands before it. Compiled models get every
micro-batch at its full width, or each new width would be compiled anew: documents without a target fill it up.

Letters: T tokens of a micro-batch, N targets in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Sampler

from tasks.errors import UserError

IGNORE_INDEX = -100
COLUMNS = ("input_ids", "labels", "seq_lengths", "seq_sources")


@dataclass(frozen=True)
class Layout:
    """How the rows of a step spread over micro-batches and processes."""

    num_rows: int
    rows_per_step: int
    microbatch_rows: int
    world_size: int

    @property
    def num_steps(self) -> int:
        """Optimizer steps; the last one may hold fewer rows."""
        return math.ceil(self.num_rows / self.rows_per_step)

    @property
    def accumulation(self) -> int:
        """Micro-batches a step and process."""
        return math.ceil(self.rows_per_step / (self.microbatch_rows * self.world_size))

    @property
    def slots_per_step(self) -> int:
        """Rows a step including fillers."""
        return self.accumulation * self.microbatch_rows * self.world_size


def load_rows(path: Path, filler_token: int) -> datasets.Dataset:
    """The memory-mapped rows, and one filler row behind the last."""
    if not path.is_file():
        raise UserError(f"{path} does not exist", todo="prepare this stage's rows first")
    rows = datasets.Dataset.from_file(str(path))
    if missing := [column for column in COLUMNS if column not in rows.column_names]:
        raise UserError(f"the rows lack the columns {missing}", where=str(path), allowed=", ".join(COLUMNS))
    if len(rows) == 0:
        raise UserError("the file holds no row", where=str(path), todo="prepare this stage's rows again")
    rows = rows.select_columns(list(COLUMNS))
    filler = {"input_ids": [[filler_token]], "labels": [[IGNORE_INDEX]], "seq_lengths": [[0]], "seq_sources": [[0]]}
    filler_rows = datasets.Dataset.from_dict(filler, features=rows.features)
    return datasets.concatenate_datasets([rows, filler_rows]).with_format("numpy")


class StepSampler(Sampler[int]):
    """Row numbers, step after step; `num_rows` is the filler row."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def __len__(self) -> int:
        return self.layout.num_steps * self.layout.slots_per_step

    def __iter__(self) -> Iterator[int]:
        layout = self.layout
        for first in range(0, layout.num_rows, layout.rows_per_step):
            for slot in range(layout.slots_per_step):
                row = first + slot
                yield row if slot < layout.rows_per_step and row < layout.num_rows else layout.num_rows


def make_collate(
    plan_attention: Callable[[Sequence[int]], dict[str, Any]], fill_to: int = 0, longest: int = 0
) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """The function from the rows of one micro-batch to tensors; `plan_attention` gets the documents' lengths.

    With `fill_to`, a micro-batch is filled up to that many tokens by documents of at most `longest` without a target.
    """

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        real = [row for row in rows if row["seq_lengths"][0] > 0]  # fillers have nothing to learn from
        num_tokens = sum(len(row["input_ids"]) for row in real)
        filling = list(_filling(fill_to - max(num_tokens, 1), longest))
        return _flatten([*(real or rows[:1]), *filling], plan_attention, num_tokens)

    return collate


def _filling(num_tokens: int, longest: int) -> Iterator[dict[str, Any]]:
    for first in range(0, num_tokens, max(longest, 1)):
        length = min(longest, num_tokens - first)
        ids, labels = np.zeros(length), np.full(length, IGNORE_INDEX)
        yield {"input_ids": ids, "labels": labels, "seq_lengths": np.array([length]), "seq_sources": np.zeros(1)}


def _flatten(
    rows: list[dict[str, Any]], plan_attention: Callable[[Sequence[int]], dict[str, Any]], num_tokens: int
) -> dict[str, Any]:
    input_ids = np.concatenate([row["input_ids"] for row in rows]).astype(np.int64)  # (T,)
    labels = np.concatenate([row["labels"] for row in rows]).astype(np.int64)  # (T,)
    lengths = np.concatenate([row["seq_lengths"] for row in rows]).astype(np.int64)
    lengths = np.maximum(lengths, 1)  # a filler's document is its one token
    assert lengths.sum() == len(input_ids) == len(labels), "a row's seq_lengths do not add up to its tokens"
    starts = np.cumsum(lengths) - lengths
    labels[starts] = IGNORE_INDEX
    sources = np.repeat(np.concatenate([row["seq_sources"] for row in rows]).astype(np.int64), lengths)  # (T,)
    targets_at = np.flatnonzero(labels != IGNORE_INDEX)  # (N,), never 0
    return {
        "input_ids": torch.from_numpy(input_ids)[None],  # (1, T)
        "position_ids": torch.from_numpy(np.arange(len(input_ids)) - np.repeat(starts, lengths))[None],  # (1, T)
        "labels": torch.from_numpy(labels)[None],  # (1, T): counted by the trainer for the step's denominator
        "predict_at": torch.from_numpy(targets_at - 1),  # (N,): the position before its target
        "targets": torch.from_numpy(labels[targets_at]),  # (N,)
        "target_sources": torch.from_numpy(sources[targets_at]),  # (N,)
        "num_tokens": num_tokens,
        **plan_attention(lengths.tolist()),
    }
