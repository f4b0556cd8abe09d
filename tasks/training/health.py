"""Whether a step may reach the weights: its loss and its gradient are finite, and its loss is no spike.

A step that is not ends the run before the optimizer moves anything, and names its sources and rows. With `on_nan: skip`
it is left out instead, up to `max_skipped` of a stage: the rows count as read, the schedule goes on, weights and Adam's
moments stay as they are. Every process judges the same sums and the same history, so all of them decide alike; the
history is that of `metrics.jsonl`, so a resumed run decides as an undisturbed one.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from pathlib import Path
from typing import Any

from tasks.errors import UserError
from tasks.training.loss import StepResult
from tasks.training.rows import Layout

STOP, SKIP = "stop", "skip"
WINDOW_STEPS, MIN_STEPS = 50, 10  # a spike is judged against the median loss of the last 50 steps, from 10 on


class Health:
    """Judges one step after the other; `max_spike` times the median loss is a spike (None: no such thing)."""

    def __init__(self, what: dict[str, Any], how: dict[str, Any], layout: Layout, rows: Path) -> None:
        self.max_spike: float | None = what.get("max_loss_spike")
        self.on_nan, self.max_skipped = how.get("on_nan", STOP), how.get("max_skipped", 0)
        self.layout, self.rows = layout, rows
        self.losses: deque[float] = deque(maxlen=WINDOW_STEPS)
        self.num_skipped = 0

    def recall(self, lines: list[dict[str, Any]]) -> None:
        """Take up the history of the steps that stand behind us."""
        self.num_skipped = sum("skipped" in line for line in lines)
        self.losses.extend(line["loss"] for line in lines if "skipped" not in line and line["supervised_tokens"])

    def judge(self, step: int, result: StepResult, grad_norm: float, lr: float, broken: list[int]) -> str:
        """Empty for a step to take, else why it is skipped. Raises `UserError` for one that ends the run.

        `broken` are the micro-batches of the step, counted over all processes, whose loss is not finite.
        """
        problem = self._problem(result, grad_norm)
        if not problem:
            # Zero is how a wrong backend shows; rows without a target have no gradient.
            assert grad_norm > 0 or result.num_targets == 0, f"step {step}: {result.num_targets} targets, no gradient"
            if result.num_targets:
                self.losses.append(result.loss)
            return ""
        if self.on_nan == SKIP and self.num_skipped < self.max_skipped:
            self.num_skipped += 1
            return f"{problem}; {self._rows(step, broken)}; sources {self._sources(result)}"
        raise self._refusal(problem, step, result, lr, broken)

    def _problem(self, result: StepResult, grad_norm: float) -> str:
        if not (math.isfinite(result.loss) and math.isfinite(grad_norm)):
            return f"not finite: loss {result.loss:g}, gradient norm {grad_norm:g}"
        if self.max_spike and result.num_targets and len(self.losses) >= MIN_STEPS:
            usual = statistics.median(self.losses)
            if result.loss > self.max_spike * usual:
                return f"a spike: loss {result.loss:.4g}, {result.loss / usual:.1f} times the usual {usual:.4g}"
        return ""

    def _refusal(self, problem: str, step: int, result: StepResult, lr: float, broken: list[int]) -> UserError:
        spent = f" after {self.num_skipped} skipped ones, which is all that max_skipped allows"
        todo = "look at these rows; lower learning_rate or max_grad_norm; or set `on_nan: skip`, which goes on from " \
               "the last checkpoint and leaves such steps out"  # fmt: skip
        if self.on_nan == SKIP:
            todo = "look at these rows; lower learning_rate or max_grad_norm; or raise max_skipped"
        return UserError(
            f"step {step} is {problem}; the weights were not touched" + (spent if self.on_nan == SKIP else ""),
            where=f"{self._rows(step, broken)} of {self.rows}, sources {self._sources(result)}, learning rate {lr:.3g}",
            todo=todo,
        )

    def _rows(self, step: int, broken: list[int]) -> str:
        """The rows of the micro-batches that broke, else of the whole step; counted from 0."""
        layout, first = self.layout, (step - 1) * self.layout.rows_per_step
        end = min(first + layout.rows_per_step, layout.num_rows)
        size = layout.microbatch_rows
        spans = [(first + size * one, min(first + size * (one + 1), end)) for one in broken] or [(first, end)]
        spans = [span for span in spans if span[0] < span[1]] or [(first, end)]
        named = [str(a) if b - a == 1 else f"{a} to {b - 1}" for a, b in spans]
        return ("row " if named[0].isdigit() and len(named) == 1 else "rows ") + ", ".join(named)

    @staticmethod
    def _sources(result: StepResult) -> str:
        """Those whose loss is not finite; where all are, every one with its loss."""
        losses = result.loss_by_source
        broken = [name for name, loss in losses.items() if not math.isfinite(loss)]
        return ", ".join(broken or [f"{name} (loss {loss:.4g})" for name, loss in losses.items()])
