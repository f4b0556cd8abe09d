"""torchao's AdamW with 8-bit states, also for FSDP2's shards.

torchao 0.18 hands whole DTensors to its compiled step. With states in 8 bits under bf16 weights that fails on torch
2.13, compiled (`aten.view.dtype` is not implemented) and eager (the propagated dtype is wrong). Adam works element by
element, so here each process steps its own shard, with torchao's arithmetic. In one process nothing differs.

Needs the extra `gpu`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torchao.optim import AdamW8bit
from torchao.optim.adam import single_param_adam


class ShardedAdamW8bit(AdamW8bit):  # type: ignore[misc]
    """`AdamW8bit` whose step sees local tensors only."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update every parameter that has a gradient."""
        assert closure is None
        update = torch.compile(single_param_adam, fullgraph=True, dynamic=False)
        with torch._dynamo.utils.disable_cache_limit():  # one entry a shape
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._update(update, parameter, group)

    def _update(self, update: Any, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = self._new_buffer(parameter, True)
            state["exp_avg_sq"] = self._new_buffer(parameter, False)
        state["step"] += 1
        update(
            shard(parameter.detach()),
            shard(parameter.grad),
            state["step"],
            shard(state["exp_avg"]),
            shard(state["exp_avg_sq"]),
            None,
            group["lr"],
            *group["betas"],
            group["weight_decay"],
            group["eps"],
            True,
            self.bf16_stochastic_round and parameter.dtype is torch.bfloat16,
        )


def shard(tensor: Any) -> torch.Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
