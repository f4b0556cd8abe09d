"""Packing, order of rows and shares: properties of the arrays, without files."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.errors import UserError
from tasks.preparation.mix import Draws, mix
from tasks.preparation.order import order_rows
from tasks.preparation.pack import cut, pack
from tasks.preparation.shares import window_deviation
from tasks.preparation.sources import SourcePlan


def best_fit_decreasing(lengths: list[int], seq_len: int) -> list[int]:
    """The textbook: one piece after another; returns the sorted room that is left in each row."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, left in enumerate(room) if left >= length]
        if fitting:
            room[min(fitting, key=lambda i: room[i])] -= length
        else:
            room.append(seq_len - length)
    return sorted(room)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 24), min_size=1, max_size=80))
def test_packing_by_counting_is_best_fit_decreasing(lengths: list[int]) -> None:
    rows = pack(np.array(lengths), 24)
    filled = np.bincount(rows, lengths)
    assert set(rows.tolist()) == set(range(len(filled)))
    assert sorted((24 - filled).astype(int).tolist()) == best_fit_decreasing(lengths, 24)


def test_rows_are_filled_to_999_permille_on_documents_of_mixed_length() -> None:
    rng = np.random.default_rng(0)
    take = np.maximum(2, rng.lognormal(np.log(600), 1.0, 30_000)).astype(np.int64)
    pieces = cut(take, 4096)
    rows = pack(pieces.length, 4096)
    filled = np.bincount(rows, pieces.length)
    assert filled.max() <= 4096
    assert (take > 4096).sum() > 100  # long documents were met
    assert take.sum() / (len(filled) * 4096) >= 0.999


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30), st.integers(1, 12))
def test_cutting_keeps_every_token_in_order(take: list[int], seq_len: int) -> None:
    pieces = cut(np.array(take), seq_len)
    for draw, tokens in enumerate(take):
        mine = pieces.draw == draw
        covered = [t for s, n in zip(pieces.start[mine], pieces.length[mine], strict=True) for t in range(s, s + n)]
        assert covered == list(range(tokens))
    assert (pieces.length > 0).all()


@pytest.mark.parametrize("num_sources", [2, 3, 5, 12])
def test_every_window_of_100_steps_holds_its_shares(num_sources: int) -> None:
    """Batches of 8 rows, the smallest: 800 rows. A random order of the same rows breaks the bound, so it is a real one."""
    rng = np.random.default_rng(num_sources)
    shares = rng.dirichlet(np.full(num_sources, 3.0))
    lengths, sources = [], []
    for number, share in enumerate(shares):
        median = [100, 300, 900, 3000][number % 4]
        lengths.append(
            np.maximum(2, rng.lognormal(np.log(median), 0.8, int(share * 4e6 / median) + 1)).astype(np.int64)
        )
        lengths[-1] = cut(lengths[-1], 1024).length
        sources.append(np.full(len(lengths[-1]), number))
    length, source = np.concatenate(lengths), np.concatenate(sources)
    mixed = rng.permutation(len(length))
    length, source = length[mixed], source[mixed]
    rows = pack(length, 1024)
    num_cells = (int(rows.max()) + 1) * num_sources
    composition = np.bincount(rows * num_sources + source, length, num_cells).reshape(-1, num_sources).astype(np.int64)
    asked = composition.sum(axis=0) / composition.sum()
    assert len(composition) > 4000
    assert ((composition > 0).sum(axis=1) > 1).mean() > 0.3  # many rows hold several sources
    order = order_rows(composition, rng)
    assert sorted(order.tolist()) == list(range(len(composition)))
    assert window_deviation(composition[order], asked, 800).max() < 0.02
    assert window_deviation(composition[rng.permutation(len(order))], asked, 800).max() > 0.015


def plan(name: str, share: float, role: str = "mix", chat: bool = False) -> SourcePlan:
    return SourcePlan(name, role, share, "messages" if chat else "text", {}, 1, (), None)  # type: ignore[arg-type]


def draw(plans: list[SourcePlan], lengths: list[list[int]], **what: object) -> list[Draws]:
    arrays = [np.array(one) for one in lengths]
    defaults = {"tokens": None, "epochs": None, "max_epochs": {"mix": 4, "replay": 1}, "seed": 0}
    return mix(plans, arrays, [np.arange(len(one)) for one in arrays], {**defaults, **what})


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(20_000, 150_000), st.floats(0.02, 0.5))
def test_documents_meet_their_budget_to_the_token(seed: int, tokens: int, replay: float) -> None:
    rng = np.random.default_rng(seed)
    lengths = [rng.integers(1, 500, 200).tolist(), rng.integers(1, 5000, 100).tolist()]
    plans = [plan("a", 1 - replay), plan("b", replay, "replay")]
    drawn = draw(plans, lengths, tokens=tokens, seed=seed)
    assert sum(one.tokens for one in drawn) in (tokens - 1, tokens, tokens + 1)
    for one, source in zip(drawn, plans, strict=True):
        assert abs(one.tokens / tokens - source.share) < 1e-3


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.3, 3.9))
def test_no_part_holds_a_document_twice_and_conversations_are_whole(seed: int, epochs: float) -> None:
    rng = np.random.default_rng(seed)
    lengths = [rng.integers(5, 300, 400).tolist(), rng.integers(1, 400, 1500).tolist()]
    drawn = draw([plan("chats", 0.8, chat=True), plan("text", 0.2, "replay")], lengths, epochs=epochs, seed=seed)
    chats = drawn[0]
    assert (chats.take == np.array(lengths[0])[chats.documents]).all()
    for one in drawn:
        pairs = set(zip(one.documents.tolist(), one.parts.tolist(), strict=True))
        assert len(pairs) == len(one.documents)
        assert one.parts.max() <= np.ceil(epochs)
        # Parts are equal but for the document on their border, and for what had to leave a part that holds it already.
        num_parts = int(one.parts.max()) + 1
        moved = one.parts != (np.cumsum(one.take) - one.take) * num_parts // one.tokens
        assert (np.bincount(one.documents)[one.documents[moved]] > 1).all()
        moved_share = one.take[moved].sum() / one.tokens
        shares = np.bincount(one.parts, one.take) / one.tokens
        assert np.abs(shares - 1 / num_parts).max() <= one.take.max() / one.tokens + moved_share
        assert moved_share < 0.05
    assert abs(chats.tokens / sum(one.tokens for one in drawn) - 0.8) < 1e-3


def test_epochs_are_passes_over_the_mix_and_replay_comes_on_top() -> None:
    drawn = draw([plan("a", 0.9), plan("b", 0.1, "replay")], [[100] * 90, [100] * 90], epochs=3)
    assert [one.tokens for one in drawn] == [27_000, 3_000]
    assert [one.epochs for one in drawn] == [3.0, pytest.approx(1 / 3)]
    assert np.bincount(drawn[0].passes).tolist() == [90, 90, 90]


def test_a_partial_pass_draws_every_document_of_the_full_ones_first() -> None:
    [one] = draw([plan("a", 1.0)], [[10] * 100], tokens=2_500)
    assert one.epochs == 2.5
    assert np.bincount(one.documents, minlength=100).min() == 2


@pytest.mark.parametrize(("role", "epochs", "limit"), [("mix", 4.2, 4), ("replay", 1.5, 1)])
def test_more_epochs_than_allowed_are_refused(role: str, epochs: float, limit: int) -> None:
    plans = [plan("a", 0.5), plan("b", 0.5, "replay")]
    small = [100] * 10
    lengths = [small, [100] * 1000] if role == "mix" else [[100] * 1000, small]
    with pytest.raises(UserError) as error:
        draw(plans, lengths, tokens=int(epochs * 1000 / 0.5))
    text = str(error.value)
    assert f"{epochs:.2f} epochs" in text
    assert f"max_epochs.{role} = {limit}" in text
    assert f"lower the budget to {int(limit * 1000 / 0.5):,} tokens" in text


def test_a_share_that_so_few_conversations_cannot_make_is_refused() -> None:
    plans = [plan("a", 0.5, chat=True), plan("b", 0.5, chat=True)]
    with pytest.raises(UserError, match=r"not 50.00%"):
        draw(plans, [[100] * 50, [70] * 50], tokens=1000)


def test_the_seed_decides_what_is_drawn() -> None:
    first, same, other = (draw([plan("a", 1.0)], [list(range(1, 200))], tokens=5000, seed=s)[0] for s in (1, 1, 2))
    assert (first.documents == same.documents).all()
    assert set(first.documents.tolist()) != set(other.documents.tolist())
