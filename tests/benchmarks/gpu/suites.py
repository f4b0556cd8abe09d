"""The cases of the GPU benchmark, by suite."""

from __future__ import annotations

from typing import Any

Case = dict[str, Any]
COMMON: Case = {
    "seq_len": 4096,
    "mean": 600,
    "text": "general",
    "rows_per_step": 16,
    "steps": 6,
}  # 65,536 tokens a step


def case(name: str, tool: str, shape: str, **more: Any) -> Case:
    """One case: `steep` is our worker; `trl` (with Liger) and `unsloth` are the tools as they come; `bare` a plain loop."""
    return COMMON | {"name": name, "tool": tool, "shape": shape, "recompute": "none"} | more


def ours(name: str, shape: str, rows: int, **more: Any) -> Case:
    """Our worker at a micro-batch."""
    return case(name, "steep", shape, microbatch_rows=rows, **more)


FSDP2: Case = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "reshard_after_forward": True},
}
SPEED_8B = [
    ours("8b unsloth", "llama-8b", 2, backend="unsloth"),
    ours("8b fsdp", "llama-8b", 2),
    case("8b raw unsloth usual", "unsloth", "llama-8b", microbatch_rows=4, recompute="unsloth"),
    case("8b raw unsloth best", "unsloth", "llama-8b", microbatch_rows=2),
    case("8b trl+liger", "trl", "llama-8b", microbatch_rows=2, padding_free=False),
    case("8b trl+liger+flex", "trl", "llama-8b", microbatch_rows=2, attention="flex_attention"),
    case("8b bare loop", "bare", "llama-8b", microbatch_rows=2),
]
SPEED_2 = [
    ours("8b fsdp x2", "llama-8b", 2, processes=2, precision="fp32-master"),
    case(
        "8b trl+liger x2",
        "trl",
        "llama-8b",
        microbatch_rows=4,
        processes=2,
        dtype="float32",
        recompute="hf",
        settings=FSDP2,
        padding_free=False,
    ),
]
SWEEP_8B = [
    ours("8b fsdp none 1", "llama-8b", 1),
    ours("8b fsdp none 4", "llama-8b", 4),
    ours("8b fsdp selective 2", "llama-8b", 2, recompute="selective"),
    ours("8b fsdp selective 4", "llama-8b", 4, recompute="selective"),
    ours("8b fsdp full 4", "llama-8b", 4, recompute="full"),
    ours("8b fsdp full 8", "llama-8b", 8, recompute="full"),
    ours("8b unsloth unsloth 4", "llama-8b", 4, recompute="unsloth", backend="unsloth"),
    ours("8b fsdp master full 1", "llama-8b", 1, recompute="full", precision="fp32-master"),
]
SMALL = [
    ours("1b fsdp", "llama-1b", 4),
    ours("1b unsloth", "llama-1b", 4, backend="unsloth"),
    ours("1b fsdp master", "llama-1b", 4, precision="fp32-master"),
    case("1b trl+liger", "trl", "llama-1b", microbatch_rows=4, padding_free=False),
    case("1b raw unsloth", "unsloth", "llama-1b", microbatch_rows=4),
    ours("0.6b fsdp", "qwen3-0.6b", 4),
    ours("0.6b unsloth", "qwen3-0.6b", 4, backend="unsloth"),
    case("0.6b trl+liger", "trl", "qwen3-0.6b", microbatch_rows=4, padding_free=False),
    ours(
        "1b 65536 unsloth",
        "llama-1b",
        1,
        backend="unsloth",
        recompute="unsloth",
        seq_len=65_536,
        rows_per_step=1,
        steps=4,
    ),
    ours("1b 65536 full", "llama-1b", 1, recompute="full", seq_len=65_536, rows_per_step=1, steps=4),
]
EXPLORE = [
    *SPEED_8B[:4],
    ours("8b fsdp none 4", "llama-8b", 4),
    ours("8b fsdp budget 0.8", "llama-8b", 4, budget=0.8),
    ours("8b fsdp budget 0.6", "llama-8b", 4, budget=0.6),
    SPEED_2[0],
    SPEED_8B[6],
    SWEEP_8B[6],
    *SMALL[-2:],
    SMALL[6],
    SMALL[5],
]
SUITES = {"explore": EXPLORE, "speed": [*SPEED_8B, *SPEED_2], "sweep": SWEEP_8B, "small": SMALL}
