"""Named precision policies: what the weights, their gradients and Adam's states are kept in.

| policy | weights | gradients | Adam's states | bytes a parameter | updates |
|---|---|---|---|---|---|
| `fp32` | float32 | float32 | float32 | 16 | exact; float32 matrix products too (no TF32) |
| `fp32-master` | float32 | float32 | float32 | 16 | exact; bf16 matrix products |
| `bf16-stochastic` | bf16 | bf16 | 8 bit | 6 | rounded at random, right on average |
| `bf16` | bf16 | bf16 | bf16 | 8 | small ones are lost: never chosen, only named |

Stochastic rounding is torchao's (`AdamW8bit(bf16_stochastic_round=True)`): an update of a tenth of a bf16 step moves
one weight in ten, where rounding to nearest moves none.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch

from tasks.errors import UserError

LOST_UPDATES = (
    "precision bf16 loses small updates: at a learning rate of 2e-5 73 % of the weights never moved in 200 steps, at "
    "5e-6 93 %, and 30 % of the learning was left; bf16-stochastic takes less memory and loses none"
)
ROUNDED_HANDOVER = (
    "the model to start from holds float32 weights, which this precision rounds to bf16: of small updates that an "
    "earlier stage made, a part is lost; one precision for all stages loses none"
)


@dataclass(frozen=True)
class Precision:
    """How a policy shows in the trainer's settings."""

    name: str
    weights: torch.dtype
    computes_bf16: bool
    rounds_at_random: bool = False
    warning: str = ""

    @property
    def autocasts(self) -> bool:
        """Whether the matrix products' dtype is not that of the weights."""
        return self.computes_bf16 and self.weights is torch.float32

    @property
    def trainer_settings(self) -> dict[str, Any]:
        """The trainer's own words for this policy."""
        return {
            "bf16": self.autocasts,
            "fp16": False,
            "tf32": False if torch.cuda.is_available() else None,
            "optim": "adamw_torch_fused",
        }

    def optimizer(
        self, what: dict[str, Any], epsilon: float
    ) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
        """Class and settings of an optimizer that the trainer cannot name."""
        if not self.rounds_at_random:
            return None
        from tasks.training.stochastic import StochasticAdamW8bit

        return StochasticAdamW8bit, {"lr": what["learning_rate"], "betas": tuple(what["adam_betas"]), "eps": epsilon}


POLICIES = {
    "fp32": Precision("fp32", torch.float32, computes_bf16=False),
    "fp32-master": Precision("fp32-master", torch.float32, computes_bf16=True),
    "bf16-stochastic": Precision("bf16-stochastic", torch.bfloat16, computes_bf16=True, rounds_at_random=True),
    "bf16": Precision("bf16", torch.bfloat16, computes_bf16=True, warning=LOST_UPDATES),
}


def precision_policy(name: str) -> Precision:
    """The policy of that name. Raises `UserError` where it is unknown or its optimizer is not installed."""
    if name not in POLICIES:
        raise UserError(f"unknown precision '{name}'", where="how.precision", allowed=", ".join(POLICIES))
    if POLICIES[name].rounds_at_random and importlib.util.find_spec("torchao") is None:
        raise UserError(f"precision {name} needs torchao, which is not installed", where="how.precision",
                        todo="pip install -e '.[gpu]'")  # fmt: skip
    return POLICIES[name]
