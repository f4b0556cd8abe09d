"""Shares: `mix.json`, what was asked for and what came out, over all rows and in every window of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from tasks.preparation.mix import Draws
from tasks.preparation.rows import Written
from tasks.preparation.sources import SourcePlan

# 100 steps of 8 rows, the smallest batch that the promise covers. Larger windows deviate less.
WINDOW_ROWS = 800
PLOTTED_WINDOWS = 100


def describe_mix(plans: list[SourcePlan], draws: list[Draws], written: Written) -> dict[str, Any]:
    """Asked and achieved share a source; the largest deviation of any window; shares along the rows, for a plot."""
    total = max(1, int(written.tokens.sum()))
    sources = {
        plan.name: {"role": plan.role, "asked": plan.share, "achieved": int(tokens) / total, "tokens": int(tokens),
                    "epochs": one.epochs}
        for plan, one, tokens in zip(plans, draws, written.tokens, strict=True)
    }  # fmt: skip
    names = [plan.name for plan in plans]
    asked = np.array([plan.share for plan in plans])
    windows = window_deviation(written.composition, asked, min(WINDOW_ROWS, written.num_rows))
    first_rows = np.unique(np.linspace(0, written.num_rows, min(PLOTTED_WINDOWS, written.num_rows) + 1).astype(int))[
        :-1
    ]
    sums = np.add.reduceat(written.composition, first_rows, axis=0, dtype=np.int64)
    shares = sums / np.maximum(1, sums.sum(axis=1, keepdims=True))
    return {
        "sources": sources,
        "windows": {
            "rows": min(WINDOW_ROWS, written.num_rows),
            "largest_deviation": dict(zip(names, windows.tolist(), strict=True)),
            "first_rows": first_rows.tolist(),
            "shares": {name: np.round(shares[:, i], 5).tolist() for i, name in enumerate(names)},
        },
    }


def window_deviation(composition: np.ndarray, asked: np.ndarray, window: int) -> np.ndarray:
    """(S,) the largest difference from the asked share over all runs of `window` rows."""
    sums = np.concatenate([np.zeros((1, len(asked)), np.int64), np.cumsum(composition, axis=0, dtype=np.int64)])
    inside = sums[window:] - sums[:-window]
    return np.abs(inside / inside.sum(axis=1, keepdims=True) - asked).max(axis=0)  # type: ignore[no-any-return]
