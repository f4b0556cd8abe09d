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
    ours("8b unsloth", "llama-8b", 4, backend="unsloth"),
    ours("8b fsdp", "llama-8b", 4),
    case("8b raw unsloth usual", "unsloth", "llama-8b", microbatch_rows=4, recompute="unsloth"),
    case("8b raw unsloth best", "unsloth", "llama-8b", microbatch_rows=2),
    case("8b trl+liger", "trl", "llama-8b", microbatch_rows=2),
    case("8b trl+liger+flex", "trl", "llama-8b", microbatch_rows=2, attention="flex_attention"),
    case("8b bare loop", "bare", "llama-8b", microbatch_rows=4, precision="bf16-stochastic"),
    case(
        "8b bare loop, borders ignored",
        "bare",
        "llama-8b",
        microbatch_rows=4,
        precision="bf16-stochastic",
        isolated=False,
    ),
]
SPEED_2 = [
    ours("8b fsdp x2", "llama-8b", 4, processes=2, precision="fp32-master", recompute="pointwise"),
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
SWEEP_8B = [  # with `8b fsdp` and `8b unsloth`: ten settings
    ours("8b fsdp pointwise 4", "llama-8b", 4, recompute="pointwise"),
    ours("8b fsdp pointwise 2", "llama-8b", 2, recompute="pointwise"),
    ours("8b fsdp selective 4", "llama-8b", 4, recompute="selective"),
    ours("8b fsdp full 4", "llama-8b", 4, recompute="full"),
    ours("8b fsdp full 8", "llama-8b", 8, recompute="full"),
    ours("8b unsloth unsloth 4", "llama-8b", 4, recompute="unsloth", backend="unsloth"),
    ours("8b fsdp master full 1", "llama-8b", 1, recompute="full", precision="fp32-master"),
    ours("8b fsdp selective 2", "llama-8b", 2, recompute="selective"),
]
SWEEP_SMALL = [  # with those of `small`
    ours("1b fsdp pointwise 4", "llama-1b", 4, recompute="pointwise"),
    ours("0.6b fsdp pointwise 4", "qwen3-0.6b", 4, recompute="pointwise"),
    ours("1b fsdp full 8", "llama-1b", 8, recompute="full"),
    ours("1b fsdp fp32 2", "llama-1b", 2, precision="fp32", compile=False),
]
LONG: Case = {"seq_len": 65_536, "rows_per_step": 1, "steps": 5}
SMALL = [
    ours("1b unsloth", "llama-1b", 4, backend="unsloth"),
    ours("1b 65536 unsloth", "llama-1b", 1, backend="unsloth", recompute="unsloth", **LONG),
    ours("0.6b unsloth", "qwen3-0.6b", 4, backend="unsloth"),
    ours("1b fsdp", "llama-1b", 4),
    ours("1b fsdp master", "llama-1b", 4, precision="fp32-master"),
    ours("0.6b fsdp", "qwen3-0.6b", 4),
    ours("1b 65536 full", "llama-1b", 1, recompute="full", **LONG),
    case("1b trl+liger", "trl", "llama-1b", microbatch_rows=4),
    case("1b raw unsloth", "unsloth", "llama-1b", microbatch_rows=4),
    case("0.6b trl+liger", "trl", "qwen3-0.6b", microbatch_rows=4),
]

# --- a model of 100 million parameters that has learned something -------------------------------------------------------

UPDATES: Case = {"seq_len": 512, "mean": 70, "rows_per_step": 16, "held_out_rows": 64, "moved": True}
PRETRAIN = ours("pretrain 100m", "llama-100m", 16, **UPDATES | {"steps": 400, "text": "general", "moved": False},
                precision="fp32-master", what={"learning_rate": 1e-3}, save="base-100m")  # fmt: skip

# --- one recipe, same curve ------------------------------------------------------------------------------------------

CURVE: Case = {"seq_len": 512, "mean": 70, "text": "regulations", "rows_per_step": 8, "steps": 200, "held_out_rows": 64,
               "what": {"learning_rate": 2e-4}}  # fmt: skip


def curves(model: str, shape: str, **more: Any) -> list[Case]:
    """200 steps of one recipe on one GPU and on two, by either backend, at several micro-batches."""
    exact: Case = {"precision": "fp32", "compile": False} | CURVE | more
    fast: Case = {"precision": "fp32-master"} | CURVE | more
    return [
        ours(f"{model} fp32 fsdp 8", shape, 8, **exact),
        ours(f"{model} fp32 unsloth 8", shape, 8, backend="unsloth", **exact),
        ours(f"{model} fp32 fsdp 1", shape, 1, **exact),
        ours(f"{model} fp32 fsdp x2 2", shape, 2, processes=2, **exact),
        ours(f"{model} master unsloth 8", shape, 8, backend="unsloth", **fast),
        ours(f"{model} master fsdp 2", shape, 2, **fast),
        ours(f"{model} master fsdp x2 4", shape, 4, processes=2, **fast),
    ]


# A trained model goes on: from random weights at 2e-4 bf16 left float32 by up to 6 % a step (h200-exact.json).
CURVES = [
    PRETRAIN,
    *curves("100m-trained", "base-100m", what={"learning_rate": 2e-5}, after=PRETRAIN["name"]),
    *curves("example", "data/regulator/base"),
    ours("example fp32 cpu 4", "data/regulator/base", 4, device="cpu", precision="fp32", compile=False, **CURVE),
]

# --- exact updates ---------------------------------------------------------------------------------------------------


def updates(rate: float) -> list[Case]:
    """A model goes on with another text, 200 steps, by precision and backend."""
    common: Case = UPDATES | {
        "steps": 200,
        "text": "regulations",
        "what": {"learning_rate": rate},
        "after": PRETRAIN["name"],
    }
    policies = ("fp32-master", "bf16-stochastic", "bf16")
    return [
        ours(f"{rate:.0e} {policy} {backend}", "base-100m", 16, precision=policy, backend=backend, **common)
        for backend in ("fsdp", "unsloth")
        for policy in policies
    ]


EXACT = [PRETRAIN, *updates(5e-6), *updates(2e-5)]
SUITES = {
    "speed": [*SPEED_2, *SPEED_8B],
    "sweep": [*SWEEP_8B, *SWEEP_SMALL],
    "small": SMALL,
    "curves": CURVES,
    "exact": EXACT,
}
