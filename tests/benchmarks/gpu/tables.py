"""The README's tables of speed and exactness, from the committed results: `python -m tests.benchmarks.gpu.tables`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
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
        "| run | precision | rows | tokens/s a GPU | MFU | peak GiB | optimizer | loss, first and last step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in [row for row in rows if not row["name"].startswith("100m")]:  # too small to say anything about speed
        valid = row.get("valid", ["speed", "memory"])
        is_timed = "speed" in valid or "pair" in valid
        fast = (f"{row['tokens_per_second']:,.0f}", f"{row['mfu']:.0%}") if is_timed else ("", "")
        peak = f"{row['peak_gib']:.1f}" if "memory" in valid else ""
        precision = row.get("precision") or (
            "fp32-master" if row.get("dtype") == "float32" else "bf16"
        )  # peers say dtype
        losses = f"{row['losses'][0]:.1f} to {row['losses'][-1]:.1f}" if row.get("losses") else ""
        share = f"{row['optimizer_share']:.1%}" if row["tool"] != "bare" and is_timed else ""
        lines.append(
            f"| {row['name']} | {precision} | {row['microbatch_rows']} | {fast[0]} | {fast[1]} | {peak} | {share} | {losses} |"
        )
    return "\n".join(lines)


def curves(rows: dict[str, Row]) -> str:
    """How far the losses of 200 steps are from the reference run's, step by step."""
    lines = [
        "| model | run | loss: largest difference | mean, signed | gradient norm: largest | mean, signed | held-out loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in differences(rows):
        loss, norm = (f"{largest:.1e} | {mean:+.1e}" for largest, mean in (found.loss, found.grad_norm))
        lines.append(f"| {found.model} | {found.kind} | {loss} | {norm} | {found.held_out:+.3%} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Difference:
    """A run against the reference run of its model, relative: per step the largest and the signed mean."""

    model: str
    kind: str  # precision, backend, rows a micro-batch
    loss: tuple[float, float]
    grad_norm: tuple[float, float]
    held_out: float


def check_curve(found: Difference) -> None:
    """One recipe, one curve: what we aim at. Norms of bf16 gradients differ more at single steps than losses do."""
    exact = found.kind.startswith("fp32 ")
    assert found.loss[0] < (1e-4 if exact else 0.01), found
    assert found.grad_norm[0] < (1e-4 if exact else 0.03), found
    assert max(abs(found.loss[1]), abs(found.grad_norm[1])) < 1e-3, found
    assert abs(found.held_out) < 0.005, found


def differences(rows: dict[str, Row]) -> Iterator[Difference]:
    """Of every run that has a reference with as many steps."""
    for name, row in rows.items():
        model, _, kind = name.partition(" ")
        reference = rows.get(f"{model} {REFERENCE}")
        if reference is None or kind == REFERENCE:
            continue
        both = []
        for key in ("losses", "grad_norms"):
            values = [b / a - 1 for a, b in zip(reference[key], row[key], strict=True)]
            both.append((max(map(abs, values)), sum(values) / len(values)))
        yield Difference(model, kind, both[0], both[1], row["held_out"] / reference["held_out"] - 1)


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
