"""The last layer and the loss in one: no more than a chunk of the logits exists at a time.

The logits of 16,384 targets over a vocabulary of 128,256 are 4.2 GB in bf16, 8.4 GB in float32, and the plain way
keeps several of them. Here the gradients are computed beside the losses, chunk after chunk in the logits' own place,
and kept for the backward pass. Liger's kernel does the same in chunks of 256 targets, of which each reads and writes
the whole gradient of the layer, and returns the losses of single targets only by computing the logits twice.

Letters: N targets, H width of the hidden states, V vocabulary, C targets of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

CHUNK_LOGITS = 2**30  # 2 GiB in bf16: large enough for the matrix units, and few passes over the weight's gradient
# What turns hidden states into other logits than `lm_head(hidden)`: those models keep their own forward pass.
CHANGES_LOGITS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "mup_width_multiplier",
)


def can_fuse(model: Any) -> bool:
    """Whether the model's logits are plainly its hidden states times the weight of its last layer."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    plain = isinstance(head, nn.Linear) and head.bias is None
    return plain and all(getattr(config, name, None) in (None, 1, 1.0) for name in CHANGES_LOGITS)


def fuse_loss(model: Any) -> None:
    """From now on `model(predict_at=, targets=, **inputs)` returns (sum of the losses, the losses (N,) for reading).

    The loss is computed inside the last layer's own call, where FSDP2 has gathered its weight.
    """
    head = model.get_output_embeddings()
    head.forward = MethodType(_head_forward, head)
    model.forward = MethodType(_model_forward, model)
    model.computes_loss = True


def _model_forward(self: Any, predict_at: Tensor, targets: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
    hidden = self.get_decoder()(**inputs).last_hidden_state[0]  # (T, H)
    losses: tuple[Tensor, Tensor] = self.get_output_embeddings()(hidden[predict_at], targets)
    return losses


def _head_forward(self: nn.Linear, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return linear_cross_entropy(hidden, self.weight, targets)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of `hidden @ weight.T`: its sum, and each target's (N,) float32 without a gradient; in nats.

    `hidden` is (N, H), `weight` (V, H), `targets` (N,). Matrix products run in autocast's dtype where it is on.
    """
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else weight.dtype
    total, losses = _LinearCrossEntropy.apply(hidden.to(dtype), weight.to(dtype), targets)
    return total, losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        num_targets, rows = len(targets), chunk_rows(weight.shape[0])
        losses = torch.empty(num_targets, dtype=torch.float32, device=hidden.device)
        hidden_grad = torch.empty_like(hidden)
        weight_grad = torch.zeros_like(weight, dtype=torch.float32)  # chunks add up: float32, whatever the weight is
        for first in range(0, num_targets, rows):
            chunk = slice(first, first + rows)
            logits = hidden[chunk] @ weight.T  # (C, V)
            losses[chunk] = _losses(logits.device.type)(logits, targets[chunk])  # and the logits are their gradients
            hidden_grad[chunk] = logits @ weight
            _add_product(weight_grad, logits.T, hidden[chunk])
            del logits  # or two chunks would stand side by side
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx: Any, total_grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        hidden_grad, weight_grad = ctx.saved_tensors
        weight_grad.mul_(total_grad)  # in place: there is no second backward pass, and torch would refuse one
        return hidden_grad * total_grad.to(hidden_grad.dtype), weight_grad.to(hidden_grad.dtype), None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right` in float32; a GPU adds within the product, 1.6 GB less to move for each chunk."""
    if total.is_cuda and left.dtype is not torch.float32:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    elif left.dtype is torch.float32:
        total.addmm_(left, right)
    else:
        total += left @ right


def chunk_rows(vocabulary: int) -> int:
    """C: a power of two, so that all chunks but the last have one shape."""
    return max(64, 1 << (CHUNK_LOGITS // vocabulary).bit_length() - 1)


@cache
def _losses(device_type: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Compiled on a GPU: two passes over the logits in place of six."""
    return torch.compile(_softmax_losses, dynamic=True) if device_type == "cuda" else _softmax_losses


def _softmax_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Losses (C,) float32; the logits (C, V) become the gradient of their sum."""
    wide = logits.float()
    log_sum = torch.logsumexp(wide, dim=1)  # (C,)
    losses = log_sum - wide.gather(1, targets[:, None])[:, 0]
    is_target = torch.arange(logits.shape[1], device=logits.device)[None] == targets[:, None]
    logits.copy_(torch.exp(wide - log_sum[:, None]) - is_target.float())
    return losses
