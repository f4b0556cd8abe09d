"""Tokens a second, before anything runs: from runs that were measured, scaled by model FLOPs and the card's rate.

A step is its forward and backward passes, a share of the card's matrix rate (MFU) for their model FLOPs, and the
optimizer, seconds a parameter. Both come from the measured run that is most alike (`configs/measurements/*.json`); what
differs from it, recompute and the tokens of a micro-batch, is a factor below. MFU = model FLOPs a second, forward and
backward without what is computed again (tasks/model_shape.py), over the rate in tasks/cards.py.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from tasks.cards import matrix_flops
from tasks.memory import KEEPING_PRODUCTS, Setting, setting_of
from tasks.model_shape import ModelShape, shape_of

MEASUREMENTS = Path(__file__).resolve().parent.parent / "configs/measurements"
MEAN_CONTEXT = 450.0  # positions that a token sees, itself included: packed documents of about 600 tokens
# Speed against keeping everything, where no run alike was measured.
RECOMPUTE_SPEED = {"none": 1.0, "pointwise": 0.995, "selective": 0.9, "full": 0.85, "unsloth": 0.78}
PRECISION_SPEED = {"fp32": 0.1, "fp32-master": 1.0, "bf16-stochastic": 1.0, "bf16": 1.0}  # no TF32 in fp32
# 1B (0.64) to 8B Llama (0.72) on an H200, all kept: what stands in for an empty folder of measurements.
REACHED_MFU = 0.7
OPTIMIZER_SECONDS_A_PARAMETER = {"fp32": 8e-12, "fp32-master": 8e-12, "bf16-stochastic": 8e-12, "bf16": 4e-12}
LAYER_SECONDS = 2e-3  # a layer's passes take no less, however small: its kernels are started one by one. An estimate
# 8B on two H200s over NVLink (float32 master weights) against one (8-bit states); between nodes not measured.
SHARDED_SPEED = 0.92
LEAST_TELLING_MFU = 0.3
HALF_SPEED_TOKENS = 500.0  # a micro-batch of so few tokens would run at half the speed of a large one


@dataclass(frozen=True)
class Speed:
    """What a step is predicted to take."""

    tokens_per_second: float  # of all GPUs together
    step_seconds: float
    basis: str  # the measured run it was scaled from, or "" for none


@dataclass(frozen=True)
class Measured:
    """One run of ours on a GPU, as `make benchmark-gpu` wrote it down."""

    name: str
    shape: ModelShape
    setting: Setting
    card: str
    tokens_per_second: float  # a GPU
    peak_gib: float
    optimizer_share: float
    rows_per_step: int
    valid: tuple[str, ...] = ("speed", "memory")  # what it may be used for: not its speed where the GPU was shared

    @property
    def step_seconds(self) -> float:
        """Seconds of a step."""
        return self.rows_per_step * self.setting.seq_len / self.setting.world_size / self.tokens_per_second

    @property
    def passes_mfu(self) -> float:
        """MFU of the forward and backward passes, the optimizer left out."""
        flops = self.tokens_per_second * self.shape.flops_per_token(MEAN_CONTEXT)
        return flops / (1 - self.optimizer_share) / matrix_flops(self.card)

    @property
    def tells_speed(self) -> bool:
        """A small model's speed is that of starting kernels, and says nothing about others."""
        return "speed" in self.valid and self.passes_mfu >= LEAST_TELLING_MFU * PRECISION_SPEED[self.setting.precision]


@cache
def measured(folder: Path = MEASUREMENTS) -> tuple[Measured, ...]:
    """Every run of our worker in the folder's files."""
    rows: list[dict[str, Any]] = []
    for file in sorted(folder.glob("*.json")):
        content = json.loads(file.read_text())
        rows += content["rows"] if isinstance(content, dict) else content
    return tuple(_measured(row) for row in rows if row.get("tool") == "steep" and row.get("peak_gib"))


def _measured(row: dict[str, Any]) -> Measured:
    shape, setting = shape_of(row["model"]["config"]), setting_of(row)
    valid = tuple(row.get("valid", ("speed", "memory")))
    return Measured(row["name"], shape, setting, row["card"], row["tokens_per_second"], row["peak_gib"],
                    row.get("optimizer_share", 0.0), row["rows_per_step"], valid)  # fmt: skip


def predict_speed(
    shape: ModelShape, setting: Setting, card: str, rows_per_step: int, runs: tuple[Measured, ...] | None = None
) -> Speed:
    """Speed of a stage on all its GPUs."""
    runs = measured() if runs is None else runs
    kept = replace(setting, recompute="none")
    alike, alike_kept = (_most_alike(shape, one, runs) for one in (setting, kept))
    mfu = min(_mfu(setting, alike), _mfu(kept, alike_kept))  # whatever they are scaled from: recompute gains nothing
    # A compiled micro-batch is filled up to its size, so rows that do not divide cost as much as full ones.
    tokens = setting.accumulation * setting.tokens
    seconds = tokens * shape.flops_per_token(MEAN_CONTEXT) / (mfu * matrix_flops(card))
    seconds = max(seconds, setting.accumulation * shape.num_layers * LAYER_SECONDS)
    seconds += _optimizer_seconds(setting, alike_kept) * shape.parameters / setting.world_size
    return Speed(rows_per_step * setting.seq_len / seconds, seconds, alike.name if alike else "")


def _most_alike(shape: ModelShape, setting: Setting, runs: tuple[Measured, ...]) -> Measured | None:
    """The measured run that differs least; how much a difference weighs is how little is known about its cost."""

    def distance(run: Measured) -> float:
        other = run.setting
        return (
            0.3 * (setting.precision != other.precision)
            + 2.0 * ((setting.precision == "fp32") != (other.precision == "fp32"))
            + 0.1 * (setting.recompute != other.recompute)  # where both keep the products
            + 1.4 * (_products_again(setting) != _products_again(other))
            + 0.1 * (setting.backend != other.backend)
            + 1.0 * ((setting.world_size > 1) != (other.world_size > 1))
            + 1.0 * abs(math.log2(shape.parameters / run.shape.parameters))
            + 0.1 * abs(math.log2(setting.tokens / other.tokens))
        )

    return min((run for run in runs if run.tells_speed), key=distance, default=None)


def _products_again(setting: Setting) -> str:
    return "" if setting.recompute in KEEPING_PRODUCTS else setting.recompute


def _mfu(setting: Setting, alike: Measured | None) -> float:
    if alike is None:
        return REACHED_MFU * _factor(setting)
    return alike.passes_mfu * _factor(setting) / _factor(alike.setting)


def _factor(setting: Setting) -> float:
    full_batch = setting.tokens / (setting.tokens + HALF_SPEED_TOKENS)
    sharded = SHARDED_SPEED if setting.world_size > 1 else 1.0
    return RECOMPUTE_SPEED[setting.recompute] * PRECISION_SPEED[setting.precision] * full_batch * sharded


def _optimizer_seconds(setting: Setting, alike: Measured | None) -> float:
    """A parameter and GPU."""
    if alike is None or alike.setting.precision != setting.precision or setting.offload != alike.setting.offload:
        return OPTIMIZER_SECONDS_A_PARAMETER[setting.precision]
    return alike.optimizer_share * alike.step_seconds * alike.setting.world_size / alike.shape.parameters
