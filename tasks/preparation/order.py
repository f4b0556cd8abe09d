"""The order of rows: seeded, and spread so evenly that every window of the training holds the asked-for shares.

Rows are sorted by what they are made of (at random among equals), and the n-th row of the output is taken from place
frac(n * golden ratio) of that sorted list. Any run of W consecutive points of that sequence covers [0, 1) evenly to
about log(W) / W, so any run of rows is made of what the whole is made of. One sort, no loop over rows.
"""

from __future__ import annotations

import numpy as np

GOLDEN = (5**0.5 - 1) / 2
STEPS_OF_SHARE = 16  # shares of a row are compared in sixteenths; finer ones are left to chance


def order_rows(composition: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The rows in the order of training. `composition[r, s]` is the number of tokens of source s in row r."""
    num_rows = len(composition)
    totals = np.maximum(composition.sum(axis=1, keepdims=True), 1)
    steps = np.rint(composition * STEPS_OF_SHARE / totals).astype(np.int8)
    alike = np.lexsort((rng.random(num_rows), *_snake(steps)[::-1]))
    points = (np.arange(num_rows) * GOLDEN + rng.random()) % 1.0
    output = np.empty(num_rows, dtype=np.int64)
    output[np.argsort(points, kind="stable")] = alike
    return output


def _snake(steps: np.ndarray) -> list[np.ndarray]:
    """Sort keys, first key first, that turn back and forth like a snake: neighbours in that order differ little.

    (1,0) (1,1) (2,0) (2,1) jumps in its second place at every change of its first; (1,0) (1,1) (2,1) (2,0) does not.
    """
    keys: list[np.ndarray] = []
    sign = np.ones(len(steps), dtype=np.int8)
    for source in range(steps.shape[1] - 1):  # the last share follows from the others
        keys.append(steps[:, source] * sign)
        sign = np.where(steps[:, source] % 2 == 0, sign, -sign).astype(np.int8)
    return keys or [np.zeros(len(steps), dtype=np.int8)]
