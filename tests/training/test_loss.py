"""The loss of a step and its sums."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from tasks.training.attention import ISOLATED, attention_plan
from tasks.training.loss import StepResult, StepSums, token_losses
from tasks.training.rows import load_rows, make_collate
from tests.training.conftest import make_documents, pack, write_rows


def test_token_losses_equal_shifted_cross_entropy_over_all_logits(base: Path, tmp_path: Path) -> None:
    rows = load_rows(write_rows(tmp_path / "rows.arrow", pack(make_documents(9))[:1]), filler_token=1)
    batch = make_collate(attention_plan(ISOLATED, "cpu"))([rows[0]])
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation=ISOLATED)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "document_lengths")}
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[0]
        full = cross_entropy(logits[:-1], batch["labels"][0, 1:], reduction="none", ignore_index=-100)
        total, ours = token_losses(model, batch)
    assert len(ours) < len(full), "some tokens should have no target"
    torch.testing.assert_close(ours, full[batch["labels"][0, 1:] != -100], atol=1e-6, rtol=0)
    torch.testing.assert_close(total, ours.sum())


def test_a_filler_has_no_loss_but_a_gradient_path(base: Path, tmp_path: Path) -> None:
    rows = load_rows(write_rows(tmp_path / "rows.arrow", pack(make_documents(9))[:1]), filler_token=1)
    batch = make_collate(attention_plan(ISOLATED, "cpu"))([rows[1]])
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation=ISOLATED)
    loss = token_losses(model, batch)[0]
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_sums_weigh_sources_by_their_targets_and_start_over() -> None:
    sums = StepSums(["a", "b", "unused"], torch.device("cpu"))
    sums.add(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0, 0, 1]), num_tokens=5)
    sums.add(torch.tensor([3.0]), torch.tensor([0]), num_tokens=2)
    result = sums.reduce((False, True))
    assert result == StepResult(3.0, {"a": 2.0, "b": 6.0}, num_tokens=7, num_targets=4, wishes=(False, True))
    assert sums.reduce() == StepResult(0.0, {}, num_tokens=0, num_targets=0, wishes=())
