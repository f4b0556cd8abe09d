"""Examples: `examples.json`, the beginning of a few documents and chats, decoded, with what is trained on."""

from __future__ import annotations

from typing import Any

import numpy as np
from tokenizers import Tokenizer

from tasks.preparation.mix import Draws
from tasks.preparation.sources import SourcePlan

EXAMPLES_A_SOURCE = 2
EXAMPLE_TOKENS = 600


def examples(
    plans: list[SourcePlan],
    draws: list[Draws],
    index: np.ndarray,
    tokens: np.ndarray,
    files: list[str],
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    """A few drawn documents a source: where they come from, and their text in trained and untrained pieces."""
    found: dict[str, Any] = {}
    for plan, one in zip(plans, draws, strict=True):
        found[plan.name] = []
        drawn = dict(zip(one.documents[:EXAMPLES_A_SOURCE].tolist(), one.take.tolist(), strict=False))
        for number, packed in drawn.items():
            document = index[number]
            ids = tokens[document["offset"] : document["offset"] + packed]
            found[plan.name].append({
                "where": f"{files[document['file']]}:{document['line']}",
                "tokens": int(document["length"]),
                "packed_tokens": packed,  # fewer where the model sees no more of it
                "pieces": pieces(ids[:EXAMPLE_TOKENS], tokenizer),
            })  # fmt: skip
    return found


def pieces(ids: np.ndarray, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Decoded runs of tokens that are trained on, or not."""
    cuts = np.flatnonzero(np.diff((ids >= 0).astype(np.int8))) + 1
    return [{"trained": bool(run[0] >= 0),
             "text": tokenizer.decode(np.where(run >= 0, run, ~run).tolist(), skip_special_tokens=False)}
            for run in np.split(ids, cuts) if len(run)]  # fmt: skip
