"""Named precision policies. Every policy keeps weights and Adam states in float32, so no update is rounded away.

- `fp32`: float32 everywhere; on a GPU the matrix products too (no TF32), so that its curve is the CPU's.
- `fp32-master`: float32 weights, gradients and states; bf16 autocast in the forward pass.

Plain bf16 weights are no policy: at CPT learning rates they learn 30 % of what they should (7 % of the
weights move).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tasks.errors import UserError


@dataclass(frozen=True)
class Precision:
    """How a policy shows in the trainer's settings."""

    name: str
    weights: torch.dtype
    autocast_bf16: bool

    @property
    def trainer_settings(self) -> dict[str, Any]:
        """The trainer's own words for this policy."""
        return {"bf16": self.autocast_bf16, "fp16": False, "tf32": False if torch.cuda.is_available() else None}


POLICIES = {
    "fp32": Precision("fp32", torch.float32, autocast_bf16=False),
    "fp32-master": Precision("fp32-master", torch.float32, autocast_bf16=True),
}


def precision_policy(name: str) -> Precision:
    """The policy of that name."""
    if name not in POLICIES:
        raise UserError(f"unknown precision '{name}'", where="how.precision", allowed=", ".join(POLICIES))
    return POLICIES[name]
