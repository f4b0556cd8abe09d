"""Time of an optimizer step: torchao's AdamW8bit as it comes, and ours: `python -m tests.benchmarks.gpu.optimizer`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torchao.optim import AdamW8bit
from transformers import AutoModelForCausalLM

from tasks.training.stochastic import StochasticAdamW8bit
from tests.benchmarks.gpu.material import SHAPES


def step_milliseconds(make: Callable[[Any], Any], shape: str) -> tuple[float, float, float]:
    """Milliseconds of the fastest of five steps, of the first one (it compiles), and GiB of the states."""
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(SHAPES[shape], dtype=torch.bfloat16)
    parameters = list(model.parameters())
    for p in parameters:
        p.grad = torch.randn_like(p) * 1e-3
    before = torch.cuda.memory_allocated()
    optimizer, times = make(parameters), []
    for group in optimizer.param_groups:
        group["lr"] = group["lr"].cuda()  # as accelerate leaves it
    for _ in range(6):
        torch.cuda.synchronize()
        began = time.perf_counter()
        optimizer.step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1000)
    return min(times[1:]), times[0], (torch.cuda.memory_allocated() - before) / 2**30


def main() -> None:
    """Print one line for `SHAPE torchao` or `SHAPE ours`; a process for each, so that none finds another's code."""
    shape, variant = sys.argv[1], sys.argv[2]
    settings: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.95), "weight_decay": 0.0}
    if variant == "torchao":
        found = step_milliseconds(lambda p: AdamW8bit(p, bf16_stochastic_round=True, **settings), shape)
    else:
        found = step_milliseconds(lambda p: StochasticAdamW8bit(p, **settings), shape)
    names = ("step_ms", "first_step_ms", "state_gib")
    print(
        json.dumps({"shape": shape, "variant": variant} | dict(zip(names, (round(x, 2) for x in found), strict=True)))
    )


if __name__ == "__main__":
    main()
