"""What layers keep and compute again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from tasks.training.attention import ISOLATED, attention_plan
from tasks.training.loss import token_losses
from tasks.training.recompute import KINDS, wrap_layers
from tasks.training.rows import load_rows, make_collate
from tests.training.conftest import make_documents, pack, write_rows


class CountProducts(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten.mm.default
        return function(*args, **(kwargs or {}))


def gradients_and_products(model: Any, batch: dict[str, Any]) -> tuple[list[torch.Tensor], int]:
    """Gradients of a micro-batch, and how many matrix products they took."""
    with CountProducts() as products:
        token_losses(model, batch)[0].backward()
    return [p.grad for p in model.parameters()], products.count


@pytest.fixture
def batch(tmp_path: Path) -> dict[str, Any]:
    """One micro-batch."""
    rows = load_rows(write_rows(tmp_path / "rows.arrow", pack(make_documents(9))[:1]), filler_token=1)
    return make_collate(attention_plan(ISOLATED, "cpu"))([rows[0]])


def test_recomputing_changes_no_gradient_and_costs_products(base: Path, batch: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation=ISOLATED)
    found = {}
    for kind in ("none", "selective", "full"):
        wrapped = copy.deepcopy(model)
        num_layers = wrap_layers(wrapped, kind, compile_layers=False)
        found[kind] = gradients_and_products(wrapped, batch)
    for kind in ("selective", "full"):
        for ours, theirs in zip(found[kind][0], found["none"][0], strict=True):
            torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
    # A layer has seven products (q k v o gate up down); down's output is only added, so nothing needs it again.
    more = {kind: (found[kind][1] - found["none"][1]) / num_layers for kind in found}
    assert more["selective"] == 3 and 6 <= more["full"] <= 7, more


def test_compiled_layers_share_one_function_and_change_nothing(
    base: Path, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_with = torch.compile  # a CI machine has no C++ compiler: trace, and run the trace as it is
    monkeypatch.setattr(torch, "compile", lambda forward: compile_with(forward, backend="aot_eager"))
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation=ISOLATED)
    found = []
    for compile_layers in (False, True):
        wrapped = copy.deepcopy(model)
        wrap_layers(wrapped, "full", compile_layers)
        token_losses(wrapped, batch)[0].backward()
        found.append([p.grad for p in wrapped.parameters()])
        functions = {layer.forward.__func__ for layer in wrapped.model.layers}
        assert len(functions) == 1 and len(wrapped.model.layers) > 1
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_compiled_layers_keep_less_from_kind_to_kind_and_learn_the_same(
    base: Path, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_with = torch.compile  # with the compiler's choice of what to keep, and without its kernels
    monkeypatch.setattr(torch, "compile", lambda forward: compile_with(forward, backend="aot_eager_decomp_partition"))
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation=ISOLATED)
    kept, gradients = [], []
    for kind in KINDS:
        torch._dynamo.reset()
        wrapped = copy.deepcopy(model)
        wrap_layers(wrapped, kind, compile_layers=True)
        weights = {p.untyped_storage().data_ptr() for p in wrapped.parameters()}
        saved: dict[int, int] = {}

        def note(tensor: torch.Tensor, weights: set[int] = weights, saved: dict[int, int] = saved) -> torch.Tensor:
            if (place := tensor.untyped_storage().data_ptr()) not in weights:
                saved[place] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = token_losses(wrapped, batch)[0]
        loss.backward()
        kept.append(sum(saved.values()))
        gradients.append([p.grad for p in wrapped.parameters()])
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == len(KINDS), dict(zip(KINDS, kept, strict=True))
    for others in gradients[1:]:
        for ours, theirs in zip(others, gradients[0], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
