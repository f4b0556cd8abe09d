"""The ledger: where every token and document went, by source. It balances exactly, or the stage fails.

    read = duplicate + dropped + kept
    kept = truncated + unused + drawn once;   packed = drawn once + repeated;   trained = packed

`packed` and `supervised` are counted from the rows as they were written, everything else from the index and the
draws, so that the two sides do not come from the same sum.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tasks.preparation.clean import DUPLICATE, OK, REASONS
from tasks.preparation.mix import Draws
from tasks.preparation.spill import chunks, forget

Counts = dict[str, int]


def count_read(index: np.ndarray, num_sources: int) -> np.ndarray:
    """(S, status, 2): documents and tokens of each source and status."""
    num_status = max(REASONS) + 1
    counts = np.zeros((num_sources, num_status, 2), dtype=np.int64)
    for part in chunks(len(index)):
        cell = index["source"][part].astype(np.int64) * num_status + index["status"][part]
        documents = np.bincount(cell, minlength=num_sources * num_status)
        tokens = np.bincount(cell, index["length"][part], num_sources * num_status)  # exact below 2^53
        counts += np.stack([documents, tokens], axis=1).astype(np.int64).reshape(counts.shape)
    forget(index)
    return counts


def source_ledger(
    counts: np.ndarray, draws: Draws, truncated: Counts, num_pieces: np.ndarray, packed: int, supervised: int
) -> dict[str, Any]:
    """One source's lines. `counts` is its (status, 2) table, `truncated` what `overflow: truncate` cuts off."""
    first, split = draws.passes == 0, num_pieces > 1
    once = int(draws.take[first].sum())
    dropped = {reason: _pair(counts[status]) for status, reason in REASONS.items() if status != DUPLICATE}
    kept = _pair(counts[OK])
    usable_tokens = kept["tokens"] - truncated["tokens"]
    return {
        "read": _pair(counts.sum(axis=0)),
        "duplicate": _pair(counts[DUPLICATE]),
        "dropped": {reason: pair for reason, pair in dropped.items() if pair["documents"]},
        "kept": kept,
        "truncated": truncated,
        "unused": {"documents": kept["documents"] - int(first.sum()), "tokens": usable_tokens - once},
        "repeated": {"documents": int((~first).sum()), "tokens": draws.tokens - once},
        "split": {"documents": int(split.sum()), "pieces": int(num_pieces[split].sum()),
                  "tokens": int(draws.take[split].sum())},
        "packed": {"documents": len(draws.take), "pieces": int(num_pieces.sum()), "tokens": packed},
        "trained": {"tokens": packed},
        "supervised": {"tokens": supervised},
        "epochs": draws.epochs,
    }  # fmt: skip


def balance(sources: dict[str, dict[str, Any]], supervised: dict[str, int]) -> dict[str, Any]:
    """The whole ledger with its total. Raises RuntimeError, naming source and difference, when it does not balance."""
    for name, lines in sources.items():
        for unit in ("documents", "tokens"):
            dropped = sum(pair[unit] for pair in lines["dropped"].values())
            _equal(name, unit, "read", lines["read"][unit], lines["duplicate"][unit] + dropped + lines["kept"][unit])
            cut_off = lines["truncated"]["tokens"] if unit == "tokens" else 0  # a document that is cut is still one
            drawn = lines["kept"][unit] - cut_off - lines["unused"][unit] + lines["repeated"][unit]
            _equal(name, unit, "packed", lines["packed"][unit], drawn)
        _equal(name, "tokens", "supervised", lines["supervised"]["tokens"], supervised[name])
    return {"sources": sources, "total": _total(list(sources.values())), "balanced": True}


def _equal(source: str, unit: str, line: str, got: int, expected: int) -> None:
    if got != expected:
        raise RuntimeError(
            f"the ledger does not balance: source '{source}', {line} {unit}: {got:,} counted, {expected:,} expected, "
            f"difference {got - expected:+,}. This is a bug in the preparation; no rows were written."
        )


def _pair(cell: np.ndarray) -> Counts:
    return {"documents": int(cell[0]), "tokens": int(cell[1])}


def _total(ledgers: list[dict[str, Any]]) -> dict[str, Any]:
    """Add up all counts, line by line; `epochs` and examples are no counts."""
    total: dict[str, Any] = {}
    for lines in ledgers:
        for line in lines.keys() - {"epochs", "examples"}:
            _add(total.setdefault(line, {}), lines[line])
    return {line: total[line] for line in ledgers[0] if line in total}


def _add(total: dict[str, Any], counts: dict[str, Any]) -> None:
    for name, value in counts.items():
        if isinstance(value, dict):
            _add(total.setdefault(name, {}), value)
        else:
            total[name] = total.get(name, 0) + value
