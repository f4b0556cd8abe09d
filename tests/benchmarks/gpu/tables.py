"""The README's tables of speed and exactness, from the committed results: `python -m tests.benchmarks.gpu.tables`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SPEED = Path("configs/measurements/h200.json")
EXACT = Path(__file__).with_name("h200-exact.json")
REFERENCE = "fp32 fsdp 8"
Row = dict[str, Any]


def tables() -> dict[str, str]:
    """All three, by the name of their place in the README."""
    exact = {row["name"]: row for row in json.loads(EXACT.read_text())["rows"]}
    return {"speed": speed(json.loads(SPEED.read_text())["rows"]), "curves": curves(exact), "updates": updates(exact)}


def speed(rows: list[Row]) -> str:
    """Tokens a second and GPU, MFU and peak memory; what a row may not be used for is left empty."""
    lines = [
        "| run | precision | rows | tokens/s a GPU | MFU | peak GiB | optimizer |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in [row for row in rows if not row["name"].startswith("100m")]:  # too small to say anything about speed
        valid = row.get("valid", ["speed", "memory"])
        is_timed = "speed" in valid or "pair" in valid
        fast = (f"{row['tokens_per_second']:,.0f}", f"{row['mfu']:.0%}") if is_timed else ("", "")
        peak = f"{row['peak_gib']:.1f}" if "memory" in valid else ""
        precision = row.get("precision") or (
            "fp32-master" if row.get("dtype") == "float32" else "bf16"
        )  # peers say dtype
        share = f"{row['optimizer_share']:.1%}" if row["tool"] != "bare" and is_timed else ""
        lines.append(
            f"| {row['name']} | {precision} | {row['microbatch_rows']} | {fast[0]} | {fast[1]} | {peak} | {share} |"
        )
    return "\n".join(lines)


def curves(rows: dict[str, Row]) -> str:
    """How far the losses of 200 steps are from the reference run's, step by step."""
    lines = [
        "| model | run | loss: largest difference | mean, signed | gradient norm | held-out loss |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        model, _, kind = name.partition(" ")
        reference = rows.get(f"{model} {REFERENCE}")
        if reference is None or kind == REFERENCE:
            continue
        loss = [b / a - 1 for a, b in zip(reference["losses"], row["losses"], strict=True)]
        norm = [b / a - 1 for a, b in zip(reference["grad_norms"], row["grad_norms"], strict=True)]
        held = f"{row['held_out'] / reference['held_out'] - 1:+.3%}" if "held_out" in row else ""
        largest = [max(map(abs, values)) for values in (loss, norm)]
        lines.append(
            f"| {model} | {kind} | {largest[0]:.1e} | {sum(loss) / len(loss):+.1e} | {largest[1]:.1e} | {held} |"
        )
    return "\n".join(lines)


def updates(rows: dict[str, Row]) -> str:
    """Held-out loss after 200 steps at CPT's learning rates, and the share of weights that moved."""
    lines = [
        "| learning rate | precision | backend | held-out loss | against fp32-master | weights moved |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in sorted(rows.items()):
        rate, _, rest = name.partition(" ")
        if not rate.endswith(("e-06", "e-05")):
            continue
        policy, backend = rest.split()
        master = rows[f"{rate} fp32-master {backend}"]["held_out"]
        lines.append(
            f"| {float(rate):.0e} | {policy} | {backend} | {row['held_out']:.4f} | {row['held_out'] / master - 1:+.2%} | {row['moved']:.1%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print("\n\n".join(tables().values()))
