"""What a decoder layer keeps for its backward pass, and what it computes again; and its compilation.

- `none` keeps everything.
- `pointwise` computes no matrix product and no attention again, but the cheapest of what lies between them (norms, the
  product of the MLP): on an H200 an 8B model takes 96 GiB in place of 118 at 16,384 tokens a micro-batch, and half a
  percent more time. It is the compiler's choice, so only compiled layers know it.
- `selective` keeps the attention's output and every second matrix product of a layer, and computes the rest again.
- `full` keeps a layer's input only.

A whole layer is compiled at once, recomputation included, and all layers share the compiled code. What wraps a layer's
call (FSDP2's gathering, a backend's own checkpointing) stays outside.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch._functorch.config
import torch.nn.attention.varlen  # defines torch_attn's operations
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tasks.errors import UserError

KINDS = ("none", "pointwise", "selective", "full")
# Share of what a compiled layer would keep; the compiler recomputes the cheapest first. At 0.6 it starts on matrix
# products: 1.6 % slower for 4 GiB.
POINTWISE_BUDGET = 0.8
Forward = Callable[..., Any]


def wrap_layers(model: Any, recompute: str, compile_layers: bool) -> int:
    """Give every decoder layer a forward pass that recomputes and is compiled as asked for; how many there are."""
    layers = decoder_layers(model)
    if compile_layers:
        torch._functorch.config.activation_memory_budget = POINTWISE_BUDGET if recompute == "pointwise" else 1.0
    forwards: dict[Forward, Forward] = {}  # one compiled function for all layers of a class
    for layer in layers:
        plain = type(layer).forward
        if plain not in forwards:
            forward = _recomputing(plain, recompute)
            forwards[plain] = torch.compile(forward) if compile_layers else forward
        if forwards[plain] is not plain:
            layer.forward = MethodType(forwards[plain], layer)
    return len(layers)


def decoder_layers(model: Any) -> list[Any]:
    """The decoder layers of a causal language model, in order."""
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None:
        raise UserError(f"{type(model).__name__} keeps its decoder layers where we do not look for them",
                        where="hardware.recompute, hardware.compile", allowed="recompute: none and compile: false",
                        todo="set both for this model")  # fmt: skip
    return list(layers)


def _recomputing(forward: Forward, recompute: str) -> Forward:
    if recompute in ("none", "pointwise"):
        return forward
    assert recompute in KINDS, recompute
    contexts: dict[str, Any] = {"context_fn": _keep_half} if recompute == "selective" else {}

    def recomputing_forward(layer: Any, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, layer, *args, use_reentrant=False, preserve_rng_state=True, **contexts, **kwargs)

    return recomputing_forward


def _keep_half() -> Any:
    """Contexts of one layer's call; counts its matrix products anew."""
    products: Counter[bool] = Counter()
    kept = _kept_operations()

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = operation in kept
        if operation is torch.ops.aten.mm.default:
            products[context.is_recompute] += 1
            keep = products[context.is_recompute] % 2 == 1
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _kept_operations() -> set[Any]:
    aten = torch.ops.aten
    return {
        torch.ops.torch_attn._varlen_attn.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
    }
