"""The last layer and the loss in one, in chunks."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from tasks import memory
from tasks.training import linear_loss
from tasks.training.attention import ISOLATED, attention_plan
from tasks.training.linear_loss import can_fuse, chunk_rows, fuse_loss, linear_cross_entropy
from tasks.training.loss import token_losses
from tasks.training.rows import load_rows, make_collate
from tests.training.conftest import make_documents, pack, write_rows


@pytest.mark.parametrize("chunk_logits", [64 * 50, 2**30])
def test_sum_losses_and_gradients_equal_the_plain_way(chunk_logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_loss, "CHUNK_LOGITS", chunk_logits)
    torch.manual_seed(0)
    hidden, weight = torch.randn(150, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    targets = torch.randint(50, (150,))
    assert (chunk_rows(50) < 150) == (chunk_logits < 2**30), "one of the cases should take several chunks"
    plain = cross_entropy(hidden @ weight.T, targets, reduction="none")
    total, losses = linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(losses, plain.detach())
    assert not losses.requires_grad
    for ours, theirs in zip(
        torch.autograd.grad(total / 7, (hidden, weight)),
        torch.autograd.grad(plain.sum() / 7, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_no_targets_give_no_loss_and_zero_gradients() -> None:
    hidden, weight = torch.randn(0, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    total, losses = linear_cross_entropy(hidden, weight, torch.empty(0, dtype=torch.long))
    total.backward()
    assert total == 0 and len(losses) == 0
    assert weight.grad is not None and not weight.grad.any()


def test_a_fused_model_learns_what_the_model_itself_would(base: Path, tmp_path: Path) -> None:
    rows = load_rows(write_rows(tmp_path / "rows.arrow", pack(make_documents(9))[:1]), filler_token=1)
    batch = make_collate(attention_plan(ISOLATED, "cpu"))([rows[0]])
    own = AutoModelForCausalLM.from_pretrained(base, attn_implementation=ISOLATED)
    assert own.config.tie_word_embeddings, "the weight's gradient comes from both of its uses"
    fused = copy.deepcopy(own)
    fuse_loss(fused)
    for model in (own, fused):
        total, _ = token_losses(model, batch)
        total.backward()
    for (name, ours), theirs in zip(fused.named_parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=2e-4, rtol=1e-4, msg=name)


def test_the_plan_of_memory_counts_the_same_chunks() -> None:
    assert memory.CHUNK_LOGITS == linear_loss.CHUNK_LOGITS


def test_models_that_change_their_logits_are_not_fused(base: Path) -> None:
    tiny = Gemma2Config(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                        num_key_value_heads=1, head_dim=8)  # fmt: skip
    assert not can_fuse(Gemma2ForCausalLM(tiny))
    assert can_fuse(AutoModelForCausalLM.from_pretrained(base))
