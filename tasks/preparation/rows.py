"""Rows: pieces become `rows.arrow`, an Arrow stream that `datasets` memory-maps, and are counted as they are written.

One row: `input_ids` and `labels` (-100 where not trained on), `seq_lengths` and `seq_sources` of its pieces. At most
`seq_len` tokens, never padded. A piece's first label is -100: nothing that it may look at comes before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from tasks.preparation.spill import forget

IGNORE_INDEX = -100
BATCH_TOKENS = 1 << 20  # written at a time; about 40 MB with all temporaries
SCHEMA = pa.schema([
    ("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32())),
    ("seq_lengths", pa.list_(pa.int32())), ("seq_sources", pa.list_(pa.int16())),
])  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """All pieces in the order they are written."""

    start: np.ndarray  # (P,) int64 first token in the spilled ids
    length: np.ndarray  # (P,) int32
    source: np.ndarray  # (P,) int16
    row: np.ndarray  # (P,) int64 ascending from 0


@dataclass(frozen=True)
class Written:
    """What stands in the file, counted from what was written."""

    num_rows: int
    tokens: np.ndarray  # (S,) by source
    supervised: np.ndarray  # (S,)
    composition: np.ndarray  # (R, S) int32 tokens by row and source


def write_rows(
    path: Path, ids: np.ndarray, layout: Layout, num_sources: int, on_progress: Callable[[int, int], None]
) -> Written:
    """Write every row; `ids` are the spilled tokens (`~id` where not trained on). `on_progress` takes rows, tokens."""
    num_rows = int(layout.row[-1]) + 1
    first_piece = np.searchsorted(layout.row, np.arange(num_rows + 1))  # (R+1,)
    tokens_before = np.concatenate([[0], np.cumsum(layout.length, dtype=np.int64)])  # (P+1,) of a piece
    row_ends = tokens_before[first_piece]  # (R+1,)
    tokens, supervised = np.zeros(num_sources, np.int64), np.zeros(num_sources, np.int64)
    composition = np.zeros((num_rows, num_sources), dtype=np.int32)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
        row = 0
        while row < num_rows:
            until = max(row + 1, int(np.searchsorted(row_ends, row_ends[row] + BATCH_TOKENS, side="right")) - 1)
            pieces = slice(int(first_piece[row]), int(first_piece[until]))
            batch, counted = _batch(ids, layout, pieces, first_piece[row : until + 1], row_ends[row : until + 1])
            writer.write_batch(batch)
            source = layout.source[pieces]
            tokens += np.bincount(source, layout.length[pieces], num_sources).astype(np.int64)
            supervised += np.bincount(source, counted, num_sources).astype(np.int64)
            np.add.at(composition, (layout.row[pieces], source), layout.length[pieces])
            forget(ids)
            row = until
            on_progress(row, int(row_ends[row]))
    return Written(num_rows, tokens, supervised, composition)


def _batch(
    ids: np.ndarray, layout: Layout, pieces: slice, first_piece: np.ndarray, row_ends: np.ndarray
) -> tuple[pa.RecordBatch, np.ndarray]:
    """Some rows as a record batch, and the number of supervised tokens of each piece."""
    starts, lengths = layout.start[pieces], layout.length[pieces]
    values = np.concatenate([ids[s : s + n] for s, n in zip(starts.tolist(), lengths.tolist(), strict=True)])
    piece_starts = np.cumsum(lengths) - lengths
    labels = np.where(values >= 0, values, np.int32(IGNORE_INDEX))
    labels[piece_starts] = IGNORE_INDEX
    counted = np.add.reduceat((labels != IGNORE_INDEX).astype(np.int32), piece_starts)
    input_ids = np.where(values >= 0, values, ~values)
    columns = [
        _lists(row_ends, input_ids), _lists(row_ends, labels),
        _lists(first_piece, lengths.astype(np.int32)), _lists(first_piece, layout.source[pieces].astype(np.int16)),
    ]  # fmt: skip
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA), counted


def _lists(ends: np.ndarray, values: np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array((ends - ends[0]).astype(np.int32)), pa.array(values))
