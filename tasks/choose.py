"""The settings of a training stage: what a hardware tag says, and for its `auto`s the fastest that fits.

Every combination of precision, recompute and micro-batch that the tag leaves open is predicted (tasks/memory.py,
tasks/speed.py); of those that leave `HEADROOM` of the GPU free the fastest is taken. `fp32-master` is preferred to
`bf16-stochastic` as long as it costs no more than `MASTER_IS_WORTH` of the speed; plain `bf16` is never chosen. A plan
that does not fit is refused, with the nearest that do. An order holds concrete values only: `auto` never reaches a
worker.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tasks.errors import UserError
from tasks.hardware import HARDWARE_FILE, Hardware
from tasks.host import host_bytes
from tasks.memory import GIB, Parts, Setting, predict
from tasks.model_shape import ModelShape
from tasks.speed import Speed, predict_speed

HEADROOM = 0.06  # of a GPU's memory: its context, fragmentation, and what the prediction misses
MASTER_IS_WORTH = 0.05
FULL_MICROBATCH_TOKENS = 16_384  # more rows at a time gain nothing
CPU_ROWS = 4
EVALUATION_BATCH_GIB = 8.0  # as tasks/evaluation/model.py sizes its batches
RANKING_CARD = "h200"  # settings of a card that is not in tasks/cards.py are ranked as on this one; no time is said


@dataclass(frozen=True)
class Job:
    """A stage as far as settings depend on it."""

    shape: ModelShape
    seq_len: int
    rows_per_step: int


@dataclass(frozen=True)
class Choice:
    """Concrete settings of a training stage, and what they are predicted to take; on CPUs nothing is predicted."""

    hardware: Hardware  # without `auto`
    job: Job | None = None
    setting: Setting | None = None
    parts: Parts | None = None
    speed: Speed | None = None

    @property
    def gib(self) -> float:
        """Predicted peak on one GPU."""
        return self.parts.total / GIB if self.parts else 0.0

    @property
    def host_gib(self) -> float:
        """What a node's processes, and what they offload, take of its own memory."""
        if self.job is None or self.setting is None:
            return 0.0
        return host_bytes(self.job.shape, self.setting, self.hardware.processes) / GIB

    @property
    def how(self) -> dict[str, Any]:
        """What the order says of it."""
        chosen = ("precision", "recompute", "microbatch_rows", "offload", "compile", "on_oom")
        said = {name: getattr(self.hardware, name) for name in chosen}
        expected = {"predicted_gib": round(self.gib, 2), "predicted_host_gib": round(self.host_gib, 2)}
        return said | (expected if self.parts else {})

    def say(self) -> str:
        """`bf16-stochastic, recompute none, 4 rows a micro-batch`."""
        rows = self.hardware.microbatch_rows
        text = f"{self.hardware.precision}, recompute {self.hardware.recompute}, "
        text += f"{rows} row{'s' if rows != 1 else ''} a micro-batch"
        return text + (", offload cpu" if self.hardware.offload == "cpu" else "")


def choose(tag: str, hardware: Hardware, job: Job | None) -> Choice:
    """The settings for a stage. Raises `UserError` for a plan that does not fit, with the nearest that do."""
    if hardware.device == "cpu":
        return Choice(_on_cpu(hardware), job)
    if job is None:
        return Choice(_as_said(tag, hardware))
    candidates = list(combinations(hardware, job))
    best = fastest_that_fits(candidates, hardware)
    if best is None:
        from tasks.alternatives import refusal  # it chooses too

        raise refusal(tag, hardware, job, candidates)
    return best


def combinations(hardware: Hardware, job: Job) -> Iterator[Choice]:
    """Every concrete form of the tag for this stage, predicted."""
    for precision in [hardware.precision] if hardware.precision != "auto" else _precisions(hardware):
        row = hardware.model_copy(update={"precision": precision})
        for recompute in [row.recompute] if row.recompute != "auto" else _recomputes(row):
            for rows in _row_counts(row, job):
                concrete = {"recompute": recompute, "microbatch_rows": rows, "compile": row.compiles}
                yield predicted(row.model_copy(update=concrete), job)


def predicted(hardware: Hardware, job: Job) -> Choice:
    """A concrete row with its memory and speed."""
    rows = hardware.microbatch_rows
    assert isinstance(rows, int), "settled before"
    accumulation = math.ceil(job.rows_per_step / (rows * hardware.world_size))
    setting = Setting(hardware.backend, hardware.precision, hardware.recompute, rows, job.seq_len, hardware.world_size,
                      hardware.offload, accumulation, bool(hardware.compile))  # fmt: skip
    speed = predict_speed(job.shape, setting, hardware.card or RANKING_CARD, job.rows_per_step)
    return Choice(hardware, job, setting, predict(job.shape, setting), speed)


def fastest_that_fits(candidates: list[Choice], hardware: Hardware) -> Choice | None:
    """Of what fits the fastest; fp32-master where it is nearly that. None when nothing fits."""
    assert hardware.memory_gib is not None
    room = hardware.memory_gib * (1 - HEADROOM if len(candidates) > 1 else 1)  # what was asked for may be tight
    fitting = [candidate for candidate in candidates if candidate.gib <= room]
    if not fitting:
        return None
    best = max(fitting, key=_tokens_per_second)
    masters = [candidate for candidate in fitting if candidate.hardware.precision == "fp32-master"]
    master = max(masters, key=_tokens_per_second, default=best)
    return master if _tokens_per_second(master) >= (1 - MASTER_IS_WORTH) * _tokens_per_second(best) else best


def evaluation_dtype(hardware: Hardware, shape: ModelShape | None) -> str:
    """What an evaluation holds the model in: float32, unless only bfloat16 fits a GPU."""
    if hardware.device == "cpu" or shape is None or hardware.memory_gib is None:
        return "float32"
    room_gib = hardware.memory_gib * (1 - HEADROOM) - EVALUATION_BATCH_GIB
    return "float32" if 4 * shape.parameters / GIB <= room_gib else "bfloat16"


def _tokens_per_second(choice: Choice) -> float:
    assert choice.speed, "of settings that were predicted"
    return choice.speed.tokens_per_second


def _precisions(hardware: Hardware) -> list[str]:
    return ["fp32-master"] if hardware.offload == "cpu" else ["fp32-master", "bf16-stochastic"]


def _recomputes(hardware: Hardware) -> list[str]:
    pointwise = ["pointwise"] if hardware.compiles else []
    return ["none", *pointwise, "selective", "full", *(["unsloth"] if hardware.backend == "unsloth" else [])]


def _row_counts(hardware: Hardware, job: Job) -> list[int]:
    """Powers of two up to a GPU's share of a step, as far as more tokens at a time are worth anything."""
    if hardware.microbatch_rows != "auto":
        return [hardware.microbatch_rows]
    share = max(1, job.rows_per_step // hardware.world_size)
    most = max(1, min(share, FULL_MICROBATCH_TOKENS // job.seq_len))
    return [1 << power for power in range(most.bit_length())]


def _on_cpu(hardware: Hardware) -> Hardware:
    settled = {"precision": "fp32", "recompute": "none", "microbatch_rows": CPU_ROWS}
    update = {name: value for name, value in settled.items() if getattr(hardware, name) == "auto"}
    row = hardware.model_copy(update=update)
    return row.model_copy(update={"compile": row.compiles})


def _as_said(tag: str, hardware: Hardware) -> Hardware:
    """The row of a model that nothing can be predicted for: it has to say everything itself."""
    open_keys = [name for name in ("precision", "recompute", "microbatch_rows") if getattr(hardware, name) == "auto"]
    if open_keys:
        raise UserError(
            "nothing can be planned for this model: it is no dense decoder with a config as Llama, Qwen and Gemma have",
            where=f"{HARDWARE_FILE}, key {tag}",
            todo=f"give {', '.join(open_keys)} in the tag's row",
        )
    return hardware.model_copy(update={"compile": hardware.compiles})
