"""The settings of a training stage: what a hardware tag says, and for its `auto`s what the plan chooses.

An order holds concrete values only: `auto` never reaches a worker.
"""

from __future__ import annotations

from typing import Any

from tasks.hardware import Hardware


def settings(hardware: Hardware) -> dict[str, Any]:
    """Precision, recompute, micro-batch, offload, compile and on_oom for one training stage."""
    on_gpu = hardware.device == "cuda"
    precision, recompute, rows = hardware.precision, hardware.recompute, hardware.microbatch_rows
    if recompute == "auto":
        recompute = "none" if not on_gpu else "unsloth" if hardware.backend == "unsloth" else "full"
    return {
        "precision": ("fp32-master" if on_gpu else "fp32") if precision == "auto" else precision,
        "recompute": recompute,
        "microbatch_rows": 1 if rows == "auto" else rows,
        "offload": hardware.offload,
        "compile": on_gpu if hardware.compile is None else hardware.compile,
        "on_oom": hardware.on_oom,
    }
