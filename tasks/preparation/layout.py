"""Layout: draws of all sources become pieces in rows, rows in their final order. Nothing but numbers so far."""

from __future__ import annotations

import numpy as np

from tasks.preparation.corpus import Corpus
from tasks.preparation.mix import Draws
from tasks.preparation.order import order_rows
from tasks.preparation.pack import cut, pack
from tasks.preparation.rows import Layout


def lay_out(corpus: Corpus, draws: list[Draws], seq_len: int, seed: int) -> tuple[Layout, list[np.ndarray]]:
    """All pieces in the order they are written, and how many pieces each draw of each source became."""
    rng = np.random.default_rng([seed, 1 << 20])  # a stream of its own beside the sources' streams (mix.py)
    start, length, source, part, num_pieces = _pieces(corpus, draws, seq_len)
    row = np.empty(len(start), dtype=np.int64)
    num_rows = 0
    for one in range(int(part.max()) + 1):
        mine = rng.permutation(np.flatnonzero(part == one))  # pieces of one length meet by chance
        packed = pack(length[mine], seq_len)
        rows_here = int(packed.max()) + 1
        cells = np.bincount(packed * len(draws) + source[mine], length[mine], rows_here * len(draws))
        order = order_rows(cells.reshape(rows_here, len(draws)), rng)
        place = np.empty(rows_here, dtype=np.int64)
        place[order] = np.arange(rows_here)
        row[mine] = num_rows + place[packed]
        num_rows += rows_here
    final = np.lexsort((rng.random(len(row)), row))  # within a row the order is by chance, not by length
    return Layout(start[final], length[final], source[final], row[final]), num_pieces


def _pieces(
    corpus: Corpus, draws: list[Draws], seq_len: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[np.ndarray]]:
    """Start, length, source and part of every piece of every source; and the number of pieces of each draw."""
    starts, lengths, sources, parts, num_pieces = [], [], [], [], []
    for number, one in enumerate(draws):
        found = cut(one.take, seq_len)
        starts.append(corpus.index["offset"][one.documents][found.draw] + found.start)
        lengths.append(found.length.astype(np.int32))
        sources.append(np.full(len(found.draw), number, dtype=np.int16))
        parts.append(one.parts[found.draw].astype(np.int16))
        num_pieces.append(np.bincount(found.draw, minlength=len(one.take)))
    return np.concatenate(starts), np.concatenate(lengths), np.concatenate(sources), np.concatenate(parts), num_pieces
