"""What happens at every step beside learning: checks, metrics, progress, and the decision to save or to stop.

Decisions are everyone's: a wish of one process (a signal that reached it, the clock of rank 0) travels with
the step's sums, so all processes save and stop at the same step.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tasks.progress import Progress, say
from tasks.training.health import Health
from tasks.training.loss import StepResult, StepSums
from tasks.training.metrics import MetricsLog
from tasks.training.preemption import preempted


class StepLog(TrainerCallback):
    """The trainer's callback; `grad_norm` is set by the trainer before each optimizer step."""

    def __init__(
        self, directory: Path, stage: str, num_steps: int, sums: StepSums, health: Health, how: dict[str, Any],
        is_main: bool,
    ) -> None:  # fmt: skip
        self.directory, self.stage, self.num_steps, self.sums = directory, stage, num_steps, sums
        self.health, self.skipped = health, ""  # why this step is skipped
        cadence, self.report_to = how.get("checkpoint") or {}, how.get("report_to", "tensorboard")
        self.every_steps, self.every_minutes = cadence.get("every_steps"), cadence.get("every_minutes")
        self.keep_last, self.is_main = cadence.get("keep_last", 2), is_main
        self.metrics: MetricsLog | None = None
        self.grad_norm = self.lr = math.nan
        self.result: StepResult | None = None
        self.saved_at = self.step_started_at = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the logs behind the step that we start from."""
        if self.is_main:
            self.metrics = MetricsLog(self.directory, state.global_step, self.report_to)
        self.progress: Progress | None = None
        self.num_tokens = 0
        self.saved_at = self.warm_at = self.step_started_at = time.monotonic()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Sum up the step over all processes; refuse or leave out a broken one before it reaches the weights."""
        self.lr, step = (
            float(optimizer.param_groups[0]["lr"]),
            state.global_step + 1,
        )  # a tensor in torchao's optimizers
        self.result = self.sums.reduce((preempted(), self._save_is_due()))
        broken = [] if math.isfinite(self.result.loss) else self.sums.broken()
        self.skipped = self.health.judge(step, self.result, self.grad_norm, self.lr, broken)
        if self.skipped:  # what has no gradient is left alone: no decay, no moments, no count of steps
            self._say(f"step {step} skipped ({self.health.num_skipped} of {self.health.max_skipped}): {self.skipped}")
            optimizer.zero_grad(set_to_none=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the step down; save and stop where wished."""
        assert self.result is not None
        now = time.monotonic()
        seconds, self.step_started_at = now - self.step_started_at, now
        self.num_tokens += self.result.num_tokens
        if self.is_main:
            self._report(state.global_step, self.result, seconds)
        stop, save = self.result.wishes
        last = state.global_step == self.num_steps
        by_steps = bool(self.every_steps) and state.global_step % self.every_steps == 0
        if stop or save or last or by_steps:
            control.should_save = True
            self._say(f"saving a checkpoint at step {state.global_step}" + (" (asked to stop)" if stop else ""))
            if self.metrics:
                self.metrics.flush()
        if stop and not last:
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The time that a save took belongs to no step."""
        self.saved_at = self.step_started_at = time.monotonic()

    def _save_is_due(self) -> bool:
        return self.every_minutes is not None and time.monotonic() - self.saved_at >= self.every_minutes * 60

    def _report(self, step: int, result: StepResult, seconds: float) -> None:
        assert self.metrics is not None
        line = {
            "step": step,
            "loss": finite(result.loss),
            "lr": self.lr,
            "grad_norm": finite(self.grad_norm),
            "tokens": result.num_tokens,
            "supervised_tokens": result.num_targets,
            "tokens_per_second": round(result.num_tokens / seconds, 1),
            "seconds": round(seconds, 4),
            "loss_by_source": {name: loss for name, loss in result.loss_by_source.items() if math.isfinite(loss)},
        }
        self.metrics.write(line | ({"skipped": self.skipped} if self.skipped else {}))
        speed = self.num_tokens / (time.monotonic() - self.warm_at)
        if self.progress is None:  # the first step also compiled, and says little of the others' time
            self.progress = Progress(self.stage, "step", self.num_steps, first=step)
            self.num_tokens, self.warm_at = 0, time.monotonic()
        self.progress.update(step, loss=f"{result.loss:.3f}", lr=f"{self.lr:.1e}", **{"": f"{speed:,.0f} tok/s"})

    def _say(self, text: str) -> None:
        if self.is_main:
            say(f"{self.stage:<14}{text}")


def finite(value: float) -> float | None:
    """The value, or None, which JSON can say."""
    return value if math.isfinite(value) else None
