"""torchao's 8-bit AdamW with stochastic rounding, with less time between its kernels.

torchao compiles one function for all parameters and lets torch search the version of each shape anew at every call:
0.5 ms a parameter on the CPU, 150 ms a step for the 291 of an 8B model whose kernels take 20. Here each shape has
its own compiled function, which takes several parameters at once. The arithmetic, the states and their format are
torchao's.

Each process steps its own shards. torchao 0.18 hands whole DTensors to its compiled step, which fails for bf16 weights
on torch 2.13: compiled because `aten.view.dtype` of its states is missing, eager because of a wrongly propagated dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
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
        for group in self.param_groups:
            with_gradient = [p for p in group["params"] if p.grad is not None]
            for p in with_gradient:
                self._advance(p)
            for key, parameters in _batches(with_gradient):
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

    def _function(self, key: Key) -> Callable[..., None]:
        if key not in self.compiled:
            # torch keeps compiled versions by code object: a copy of it for each shape leaves nothing to search.
            code = _update.__code__.replace(co_name=f"update_{len(self.compiled)}")
            self.compiled[key] = torch.compile(FunctionType(code, globals()), fullgraph=True, dynamic=False)
        return self.compiled[key]


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
