"""The cases of the GPU benchmark, by suite."""

from __future__ import annotations

from typing import Any

Case = dict[str, Any]


def steep(name: str, shape: str, **more: Any) -> Case:
    """Our worker."""
    return {"name": name, "tool": "steep", "shape": shape, "rows_per_step": 16, "steps": 5} | more


def peer(name: str, shape: str, tool: str, **more: Any) -> Case:
    """TRL with Liger, or raw Unsloth."""
    return {"name": name, "tool": tool, "shape": shape, "rows_per_step": 16, "steps": 5, "recompute": "none"} | more


EXPLORE = [
    steep("1b-fsdp-none", "llama-1b", microbatch_rows=4, steps=6),
    steep("1b-unsloth-none", "llama-1b", microbatch_rows=4, steps=6, backend="unsloth"),
    steep("8b-fsdp-none-2", "llama-8b", microbatch_rows=2),
    steep("8b-fsdp-none-4", "llama-8b", microbatch_rows=4),
    steep("8b-unsloth-none-4", "llama-8b", microbatch_rows=4, backend="unsloth"),
    steep("8b-fsdp-selective-4", "llama-8b", microbatch_rows=4, recompute="selective"),
    steep("1b-fsdp-master", "llama-1b", microbatch_rows=4, precision="fp32-master"),
    steep("1b-unsloth-unsloth", "llama-1b", microbatch_rows=8, backend="unsloth", recompute="unsloth"),
    steep("1b-fsdp-full", "llama-1b", microbatch_rows=8, recompute="full"),
    steep("1b-fsdp-fp32", "llama-1b", microbatch_rows=2, precision="fp32", compile=False, rows_per_step=4, steps=3),
]
SUITES = {"explore": EXPLORE}
