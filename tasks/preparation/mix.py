"""Mixing: the stage's token budget over its sources, as draws of documents.

A source gets `share x budget` tokens. Each pass takes its documents in one seeded order; a source that is asked for
more than it has starts over, and refuses beyond `max_epochs`. Documents meet their target to the token: the last one
drawn is cut. Conversations are never cut; of the last pass those are drawn that fill the target best, and the targets
of the documents then follow what the conversations really made, so that shares hold.

The draws are dealt over `num_parts` parts that are packed one after another, each holding the same share of every
source and no document twice: so repeats of a document stand a pass apart, and never in one row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.errors import UserError
from tasks.preparation.sources import SourcePlan

MAX_SHARE_ERROR = 0.001  # 0.1 percentage point


@dataclass(frozen=True)
class Draws:
    """Documents drawn of one source, in order. A document's first `take` tokens are used."""

    documents: np.ndarray  # (D,) int64 numbers in the index
    take: np.ndarray  # (D,) int64 tokens
    passes: np.ndarray  # (D,) int32: 0 is a document's first time
    parts: np.ndarray  # (D,) int64
    epochs: float

    @property
    def tokens(self) -> int:
        """Tokens drawn."""
        return int(self.take.sum())


def mix(
    plans: list[SourcePlan], lengths: list[np.ndarray], documents: list[np.ndarray], what: dict[str, Any]
) -> list[Draws]:
    """The draws of each source. `lengths` and `documents` describe what each source has left after cleaning."""
    have = [int(one.sum(dtype=np.int64)) for one in lengths]
    budget = _budget(plans, have, what)
    _check_epochs(plans, have, budget, what["max_epochs"])
    rngs = [np.random.default_rng([what["seed"], number]) for number in range(len(plans))]
    drawn: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    for chats_first in (True, False):
        if not chats_first and drawn:  # what conversations made is the measure now
            budget = sum(int(take.sum()) for _, take, _ in drawn.values()) / sum(plans[i].share for i in drawn)
        for number, plan in enumerate(plans):
            if plan.is_chat == chats_first:
                target = round(plan.share * budget)
                drawn[number] = _draw(lengths[number], target, rngs[number], cut_last=not plan.is_chat)
    num_parts = max(-(-int(drawn[i][1].sum()) // have[i]) for i in drawn)
    result = []
    for number in range(len(plans)):
        local, take, passes = drawn[number]
        parts = _deal(local, take, max(1, num_parts))
        result.append(Draws(documents[number][local], take, passes, parts, int(take.sum()) / have[number]))
    _check_shares(plans, [draws.tokens for draws in result])
    return result


def _budget(plans: list[SourcePlan], have: list[int], what: dict[str, Any]) -> float:
    """Tokens of the stage. `epochs` counts passes over all of `mix` together; replay comes on top."""
    if what.get("tokens") is not None:
        return float(what["tokens"])
    mix_tokens = sum(tokens for plan, tokens in zip(plans, have, strict=True) if plan.role == "mix")
    return float(what["epochs"] * mix_tokens / sum(plan.share for plan in plans if plan.role == "mix"))


def _check_epochs(plans: list[SourcePlan], have: list[int], budget: float, max_epochs: dict[str, float]) -> None:
    for plan, tokens in zip(plans, have, strict=True):
        epochs = plan.share * budget / tokens
        if epochs > max_epochs[plan.role] + 1e-6:
            fits = int(max_epochs[plan.role] * tokens / plan.share)
            raise UserError(
                f"'{plan.name}' has {tokens:,} tokens and is asked for {plan.share * budget:,.0f}: {epochs:.2f} epochs",
                where=f"{plan.role}.{plan.name}", allowed=f"max_epochs.{plan.role} = {max_epochs[plan.role]:g}",
                todo=f"lower the budget to {fits:,} tokens or its share, raise max_epochs, or add data",
            )  # fmt: skip


def _draw(
    lengths: np.ndarray, target: int, rng: np.random.Generator, cut_last: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(local numbers, tokens taken, pass) of documents that hold `target` tokens."""
    order = rng.permutation(len(lengths))
    in_order = lengths[order].astype(np.int64)
    full_passes, rest = divmod(target, int(in_order.sum()))
    ends = np.cumsum(in_order)
    whole = int(np.searchsorted(ends, rest, side="right"))  # documents of the last pass that fit entirely
    gap = rest - (int(ends[whole - 1]) if whole else 0)
    last, last_take = np.arange(whole), in_order[:whole]
    if cut_last and gap:
        last, last_take = np.r_[last, whole], np.r_[last_take, gap]
    elif gap:
        more = _fill(in_order[whole:], gap) + whole
        last, last_take = np.r_[last, more], np.r_[last_take, in_order[more]]
    documents = np.concatenate([np.tile(order, full_passes), order[last]])
    take = np.concatenate([np.tile(in_order, full_passes), last_take])
    passes = np.repeat(np.arange(full_passes + 1, dtype=np.int32), [*[len(order)] * full_passes, len(last)])
    return documents, take, passes


def _fill(lengths: np.ndarray, gap: int) -> np.ndarray:
    """Numbers of a few items that fill the gap best: always the longest that still fits."""
    order = np.argsort(lengths, kind="stable")
    ascending = lengths[order]
    chosen: list[int] = []
    free = len(order)
    while (free := min(free, int(np.searchsorted(ascending, gap, side="right")))) > 0:
        free -= 1
        chosen.append(int(order[free]))
        gap -= int(ascending[free])
    return np.sort(np.array(chosen, dtype=np.int64))


def _deal(documents: np.ndarray, take: np.ndarray, num_parts: int) -> np.ndarray:
    """Each draw's part: an equal number of tokens each, in order. No part holds a document twice.

    Passes have one order, so equal documents stand a pass apart and a part is no longer than a pass. Only the
    documents that `_fill` picked early may break that: such a one goes to the next part that lacks it.
    """
    total = int(take.sum())
    if not total:
        return np.zeros(0, dtype=np.int64)
    parts = (np.cumsum(take) - take) * num_parts // total
    while True:
        order = np.lexsort((np.arange(len(parts)), parts, documents))
        same = (documents[order][1:] == documents[order][:-1]) & (parts[order][1:] == parts[order][:-1])
        if not same.any():
            return parts  # type: ignore[no-any-return]
        later = order[1:][same]
        parts[later] = (parts[later] + 1) % num_parts


def _check_shares(plans: list[SourcePlan], tokens: list[int]) -> None:
    total = sum(tokens)
    for plan, got in zip(plans, tokens, strict=True):
        few = "so few conversations cannot make that share, and they are never cut"
        few = few if plan.is_chat else "so few tokens cannot make that share"
        if abs(got / max(1, total) - plan.share) > MAX_SHARE_ERROR:
            raise UserError(
                f"'{plan.name}' makes {got / max(1, total):.2%} of {total:,} tokens, not {plan.share:.2%}",
                where=f"{plan.role}.{plan.name}", allowed="within 0.1 percentage point",
                todo=f"raise the budget: {few}",
            )  # fmt: skip
