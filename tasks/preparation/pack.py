"""Packing: pieces of documents into rows of `seq_len` tokens, best-fit-decreasing over everything.

A document longer than a row is cut into full rows and a rest. Then the pieces go by decreasing length, each into the
row with the least room that still holds it. That is done by counting, a length at a time: all pieces of a length meet
all rows with a certain room in one step, so the cost depends on the number of different lengths and not on the number
of pieces.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Pieces:
    """Pieces of documents, each to stand in one row."""

    draw: np.ndarray  # (P,) which draw a piece belongs to
    start: np.ndarray  # (P,) first token within the document
    length: np.ndarray  # (P,) tokens, at most seq_len


def cut(take: np.ndarray, seq_len: int) -> Pieces:
    """Cut what each draw takes into pieces of at most `seq_len` tokens."""
    number = -(-take // seq_len)
    draw = np.repeat(np.arange(len(take)), number)
    nth = np.arange(len(draw)) - np.repeat(np.cumsum(number) - number, number)
    start = nth * seq_len
    return Pieces(draw, start, np.minimum(seq_len, take[draw] - start))


def pack(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """The row of each piece, 0 to the number of rows - 1."""
    by_length = np.argsort(-lengths, kind="stable")
    sizes, firsts, counts = np.unique(-lengths[by_length], return_index=True, return_counts=True)
    rows = np.empty(len(lengths), dtype=np.int64)
    room = _Room(seq_len)
    for size, first, count in zip((-sizes).tolist(), firsts.tolist(), counts.tolist(), strict=True):
        rows[by_length[first : first + count]] = _place(room, size, count)
    return rows


def _place(room: _Room, size: int, count: int) -> np.ndarray:
    """Rows for `count` pieces of one size."""
    placed: list[np.ndarray] = []
    while count:
        space = room.smallest(size) or room.seq_len
        each = space // size  # a row that stays the best fit takes several
        wanted = -(-count // each)
        rows = room.take(space, wanted) if room.smallest(size) else room.open(wanted)
        num_here = min(count, len(rows) * each)
        placed.append(np.repeat(rows, each)[:num_here])
        full, partly = divmod(num_here, each)
        room.put(space - each * size, rows[:full])
        if partly:
            room.put(space - partly * size, rows[full:])
        count -= num_here
    return np.concatenate(placed)


class _Room:
    """Rows by the room that they have left. A bit set of the rooms that occur finds the smallest that fits."""

    def __init__(self, seq_len: int) -> None:
        self.seq_len, self.num_rows, self.bits = seq_len, 0, 0
        self.stacks: list[list[np.ndarray]] = [[] for _ in range(seq_len + 1)]

    def smallest(self, size: int) -> int:
        """The smallest room >= size that a row has; 0 when none has."""
        fitting = self.bits >> size
        return size + (fitting & -fitting).bit_length() - 1 if fitting else 0

    def open(self, number: int) -> np.ndarray:
        """New rows."""
        self.num_rows += number
        return np.arange(self.num_rows - number, self.num_rows)

    def take(self, space: int, number: int) -> np.ndarray:
        """Up to `number` rows with that room."""
        stack, taken, have = self.stacks[space], [], 0
        while stack and have < number:
            rows = stack.pop()
            if len(rows) > number - have:
                stack.append(rows[number - have :])
                rows = rows[: number - have]
            taken.append(rows)
            have += len(rows)
        if not stack:
            self.bits &= ~(1 << space)
        return np.concatenate(taken)

    def put(self, space: int, rows: np.ndarray) -> None:
        """Rows now have that room."""
        if space and len(rows):
            self.stacks[space].append(rows)
            self.bits |= 1 << space
