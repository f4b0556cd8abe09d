"""The loss of a step: summed over the targets of all micro-batches on all processes, divided once by their
number.

`StepSums` collects, beside the loss, what the metrics need: the loss of each source, tokens and targets. It
keeps sums on the device and crosses processes once a step; wishes (stop, save) travel in the same message.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F


def token_losses(model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of the targets of a micro-batch in nats: its sum, and each target's (N,) float32."""
    inputs = dict(inputs)
    targets, predict_at = inputs.pop("targets"), inputs.pop("predict_at")  # (N,), (N,)
    for name in ("labels", "target_sources", "num_tokens"):
        inputs.pop(name, None)
    if getattr(model, "computes_loss", False):  # tasks.training.linear_loss
        total, losses = model(**inputs, predict_at=predict_at, targets=targets, use_cache=False)
        return total, losses
    # Logits only where a target is: for a chat, that is a fraction of the row.
    logits = model(**inputs, use_cache=False, logits_to_keep=predict_at).logits[0]  # (N, vocabulary)
    if len(targets) == 0:  # a filler: no loss, but every process takes part in the backward pass
        return logits.sum() * 0.0, logits.new_zeros(0)
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    return losses.sum(), losses.detach()


@dataclass(frozen=True)
class StepResult:
    """The sums of one step over all processes."""

    loss: float  # nats a target
    loss_by_source: dict[str, float]  # only sources with a target in this step
    num_tokens: int
    num_targets: int
    wishes: tuple[bool, ...]


class StepSums:
    """Sums over the micro-batches of one step."""

    def __init__(self, sources: list[str], device: torch.device) -> None:
        self.sources = sources
        # By source: loss, then targets. float64: counts stay exact, and so does the order-free part of the sum.
        self.sums = torch.zeros(2, len(sources), dtype=torch.float64, device=device)
        self.num_tokens = 0
        self.microbatches: list[torch.Tensor] = []  # the loss of each, () on the device
        self.reduced: list[torch.Tensor] = []  # those of the last step that was reduced

    def add(self, losses: torch.Tensor, target_sources: torch.Tensor, num_tokens: int) -> None:
        """Take in one micro-batch; `losses` and `target_sources` are (N,)."""
        self.num_tokens += num_tokens
        self.microbatches.append(losses.detach().sum())
        if len(target_sources) == 0:
            return
        losses = losses.double()
        for row, values in enumerate((losses, torch.ones_like(losses))):
            # Not bincount: on a GPU it asks for the highest source, and the backward pass would wait for the answer.
            self.sums[row] += torch.zeros_like(self.sums[row]).index_add_(0, target_sources, values)

    def broken(self) -> list[int]:
        """The micro-batches of the step just reduced whose loss is not finite, in the order of their rows.

        Every process calls it, or none: it costs a message, so it is for a step that broke.
        """
        together = dist.is_available() and dist.is_initialized()
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        flags = torch.zeros(len(self.reduced) * world_size, device=self.sums.device)
        flags[rank::world_size] = (~torch.isfinite(torch.stack(self.reduced))).float()
        if together:
            dist.all_reduce(flags)
        return [number for number, flag in enumerate(flags.tolist()) if flag]

    def reduce(self, wishes: tuple[bool, ...] = ()) -> StepResult:
        """The step over all processes; starts the next one. A wish of one process is everyone's."""
        head = torch.tensor([self.num_tokens, *wishes], dtype=torch.float64, device=self.sums.device)
        message = torch.cat([head, self.sums.flatten()])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(message)
        values = message.tolist()
        num_tokens, shared, sums = int(values[0]), values[1 : 1 + len(wishes)], values[1 + len(wishes) :]
        losses, counts = sums[: len(self.sources)], sums[len(self.sources) :]
        self.sums.zero_()
        self.num_tokens = 0
        self.reduced, self.microbatches = self.microbatches, []
        return StepResult(
            loss=sum(losses) / max(1.0, sum(counts)),
            loss_by_source={name: s / n for name, s, n in zip(self.sources, losses, counts, strict=True) if n},
            num_tokens=num_tokens,
            num_targets=int(sum(counts)),
            wishes=tuple(value > 0 for value in shared),
        )
