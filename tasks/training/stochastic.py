"""torchao's 8-bit AdamW with stochastic rounding, faster: the arithmetic, the states and their format are torchao's.

On a GPU what has 8-bit states is stepped by one kernel of ours (`stochastic_kernel`). The rest (tensors below 4,096
values, CPUs) takes torchao's function, which torch compiles. torchao compiles one for all parameters and lets torch
search the version of each shape anew at every call; here each shape has its own, which takes several at once.

Each process steps its own shards. torchao 0.18 hands whole DTensors to its compiled step, which fails for bf16 weights
on torch 2.13: compiled because `aten.view.dtype` of its states is missing, eager because of a wrongly propagated dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchao.optim import AdamW8bit
from torchao.optim.adam import single_param_adam

from tasks.training.moments import part_of

PARAMETERS_A_CALL = 4
Key = tuple[Any, ...]


class StochasticAdamW8bit(AdamW8bit):  # type: ignore[misc]
    """`torchao.optim.AdamW8bit(bf16_stochastic_round=True)`: the same states and updates."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, bf16_stochastic_round=True, **settings)
        self.compiled: dict[Key, Callable[..., None]] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update every parameter that has a gradient."""
        assert closure is None, "no trainer of ours passes a closure"
        seed = int(torch.randint(2**31, ()))  # of a generator that checkpoints hold
        for group in self.param_groups:
            rest, lr = [], float(group["lr"])  # once: accelerate moves it to the GPU, and each look would wait for it
            for number, p in enumerate(p for p in group["params"] if p.grad is not None):
                self._advance(p)
                if self._in_one_pass(p):
                    self._step_in_one_pass(p, group, lr, _seed_of(seed, number))
                else:
                    rest.append(p)
            for key, parameters in _batches(rest):
                self._function(key)(
                    [part_of(p.detach()) for p in parameters],
                    [part_of(p.grad) for p in parameters if p.grad is not None],
                    [{name: part_of(value) for name, value in self.state[p].items()} for p in parameters],
                    group["lr"], *group["betas"], group["weight_decay"], group["eps"],
                )  # fmt: skip

    def _advance(self, p: Tensor) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = self._new_buffer(p, True), self._new_buffer(p, False)
        state["step"] += 1

    def _in_one_pass(self, p: Tensor) -> bool:
        part, eight_bits = part_of(p.detach()), hasattr(part_of(self.state[p]["exp_avg"]), "codes")
        return part.is_cuda and part.dtype is torch.bfloat16 and part.is_contiguous() and eight_bits

    def _step_in_one_pass(self, p: Tensor, group: dict[str, Any], lr: float, seed: int) -> None:
        from tasks.training.stochastic_kernel import step_in_one_pass  # Triton comes with torch for GPUs only

        assert p.grad is not None
        state = {name: part_of(value) for name, value in self.state[p].items()}
        step_in_one_pass(
            part_of(p.detach()), part_of(p.grad), state["exp_avg"], state["exp_avg_sq"], step=float(state["step"]),
            lr=lr, betas=group["betas"], weight_decay=group["weight_decay"], eps=group["eps"], seed=seed,
        )  # fmt: skip

    def _function(self, key: Key) -> Callable[..., None]:
        if key not in self.compiled:
            # torch keeps compiled versions by code object: a copy of it for each shape leaves nothing to search.
            code = _update.__code__.replace(co_name=f"update_{len(self.compiled)}")
            self.compiled[key] = torch.compile(FunctionType(code, globals()), fullgraph=True, dynamic=False)
        return self.compiled[key]


def _seed_of(seed: int, number: int) -> int:
    """31 bits for a parameter on this process; Knuth's multiplicative hash keeps neighbours apart."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return (seed + (number * 4096 + rank) * 2_654_435_761) % 2**31


def _batches(parameters: list[Tensor]) -> Iterator[tuple[Key, list[Tensor]]]:
    """Parameters of one shape, a few at a time."""
    by_shape: dict[Key, list[Tensor]] = {}
    for p in parameters:
        by_shape.setdefault((tuple(part_of(p).shape), p.dtype), []).append(p)
    for key, members in by_shape.items():
        for first in range(0, len(members), PARAMETERS_A_CALL):
            batch = members[first : first + PARAMETERS_A_CALL]
            yield (*key, len(batch)), batch


def _update(
    parameters: list[Tensor], gradients: list[Tensor], states: list[dict[str, Tensor]],
    lr: Tensor, beta1: float, beta2: float, weight_decay: float, eps: float,
) -> None:  # fmt: skip
    for p, gradient, state in zip(parameters, gradients, states):  # noqa: B905  # dynamo traces it as it stands
        single_param_adam(p, gradient, state["step"], state["exp_avg"], state["exp_avg_sq"], None, lr, beta1, beta2,
                          weight_decay, eps, True, p.dtype is torch.bfloat16)  # fmt: skip
