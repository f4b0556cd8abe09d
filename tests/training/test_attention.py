"""Documents of a packed row do not see each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, Qwen3Config

from tasks.training.attention import ISOLATED, attention_plan, choose_attention, isolated_attention
from tasks.training.loss import token_losses
from tasks.training.rows import load_rows, make_collate
from tests.training.conftest import crowded_row, write_rows

LENGTHS = [40, 3, 1, 33, 70, 12]


def masked_reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The dense block mask, which we avoid."""
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    mask = (document[:, None] == document[None]) & torch.ones(len(document), len(document)).tril().bool()
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_both_paths_equal_the_block_mask_forward_and_backward(device_type: str) -> None:
    torch.manual_seed(0)
    total = sum(LENGTHS)
    query, key, value = (torch.randn(1, heads, total, 8, requires_grad=True) for heads in (4, 2, 2))
    plan = attention_plan(ISOLATED, device_type)(LENGTHS)  # the GPU's plan computes on any device
    assert ("bucket_take" in plan) == (device_type == "cuda")
    weights = torch.randn(1, total, 4, 8)
    found = []
    for out in (masked_reference(query, key, value), isolated_attention(None, query, key, value, None, **plan)[0]):
        grads = torch.autograd.grad((out * weights).sum(), (query, key, value))
        found.append([out, *grads])
    for reference, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, atol=2e-6, rtol=0)


def test_bounds_are_cumulative_and_exact() -> None:
    plan = attention_plan(ISOLATED, "cuda", bf16=True)(LENGTHS)
    assert plan["longest_document"] == 70
    assert plan["document_bounds"].tolist() == [0, 40, 43, 44, 77, 147, 159]


def test_packed_documents_are_predicted_as_if_alone(base: Path, tmp_path: Path) -> None:
    packed = crowded_row()
    alone, start = [], 0
    for length in packed["seq_lengths"]:
        piece = {name: packed[name][start : start + length] for name in ("input_ids", "labels")}
        alone.append(piece | {"seq_lengths": [length], "seq_sources": [0]})
        start += length
    rows = load_rows(write_rows(tmp_path / "rows.arrow", [packed, *alone]), filler_token=1)
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation=ISOLATED)
    collate = make_collate(attention_plan(ISOLATED, "cpu"))
    with torch.no_grad():
        together = token_losses(model, collate([rows[0]]))[1]
        apart = torch.cat([token_losses(model, collate([rows[i + 1]]))[1] for i in range(len(alone))])
        # The same row with its borders ignored: proves that isolation matters here.
        whole = collate([rows[0]]) | {"document_lengths": (len(packed["input_ids"]),)}
        mixed = token_losses(model, whole)[1]
    torch.testing.assert_close(together, apart, atol=2e-6, rtol=0)
    assert (mixed - apart).abs().max() > 1e-3


def test_isolation_equals_the_block_mask_of_transformers(base: Path, tmp_path: Path) -> None:
    rows = load_rows(write_rows(tmp_path / "rows.arrow", [crowded_row()]), filler_token=1)
    losses = []
    for implementation in (ISOLATED, "sdpa"):
        model = AutoModelForCausalLM.from_pretrained(base, attn_implementation=implementation)
        batch = make_collate(attention_plan(implementation, "cpu"))([rows[0], rows[0]])
        with torch.no_grad():
            losses.append(token_losses(model, batch)[1])
    torch.testing.assert_close(losses[0], losses[1], atol=2e-6, rtol=0)


def test_models_that_need_more_than_causal_attention_keep_their_own() -> None:
    assert choose_attention(LlamaConfig(), 512) == ISOLATED
    assert choose_attention(Qwen3Config(), 512) == ISOLATED
    assert choose_attention(MistralConfig(sliding_window=512), 512) == ISOLATED  # no document is longer than its window
    assert choose_attention(MistralConfig(sliding_window=511), 512) == "sdpa"
    assert choose_attention(Gemma2Config(), 512) == "sdpa"  # soft-capped
    assert attention_plan("sdpa", "cpu")([3, 4]) == {}
