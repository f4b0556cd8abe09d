"""What a run measured, step by step: `metrics.jsonl` (one line a step), and the curves of a tracker. By rank 0.

Each checkpoint holds the lines up to its step under its digests, and a resumed run goes on from those, so that every
step stands there once, whatever became of the file meanwhile. A tracker is a courtesy:
when its server is away, at the start or later, the training goes on. Only a package that is missing is refused.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tasks.errors import UserError
from tasks.progress import say
from tasks.stage import write_text
from tasks.training.trackers import Tracker, open_tracker

METRICS = "metrics.jsonl"
SECONDS_WITHOUT_TRACKER = 300.0  # after a failure; each try may wait for a server's time-out, and a step waits with it


class MetricsLog:
    """Appends one line a step to both places."""

    def __init__(self, directory: Path, first_step: int, report_to: str = "tensorboard") -> None:
        kept = [line for line in read_metrics(directory) if line["step"] <= first_step]
        self.lines = [json.dumps(line) + "\n" for line in kept]
        write_text(directory / METRICS, "".join(self.lines))
        self.file = (directory / METRICS).open("a", encoding="utf-8")
        self.directory, self.report_to, self.told, self.try_again_at = directory, report_to, False, 0.0
        self.open = partial(open_tracker, report_to, directory, first_step)
        self.board: Tracker | None = None
        self.drawn = 0  # the last step that the tracker holds
        self._politely(lambda board: None)

    def write(self, line: dict[str, Any]) -> None:
        """One step. The line survives a kill of this process at once; events when `flush` was called."""
        self.lines.append(json.dumps(line) + "\n")
        self.file.write(self.lines[-1])
        self.file.flush()
        self._politely(lambda board: self._draw(board, line))

    def save(self, checkpoint: Path) -> None:
        """Put the lines so far into a checkpoint: those that were written, not what a disk has made of them."""
        write_text(checkpoint / METRICS, "".join(self.lines))

    def flush(self) -> None:
        """Called before a checkpoint is published: what stands behind it is never lost, not in a power cut either."""
        os.fsync(self.file.fileno())
        self._politely(lambda board: board.flush())

    def close(self, **totals: float) -> None:
        """Write the figures of the whole stage and end."""
        last = json.loads(self.lines[-1])
        self.try_again_at = 0.0  # for the last time
        self._politely(lambda board: self._end(board, last, totals))
        self.file.close()

    def _draw(self, board: Tracker, last: dict[str, Any]) -> None:
        """Every step up to this one that the tracker lacks: a resume or a failure may have left out some."""
        missed = last["step"] > self.drawn + 1
        for line in map(json.loads, self.lines) if missed else [last]:
            if line["step"] > self.drawn:
                self._draw_step(board, line)
                self.drawn = line["step"]

    def _draw_step(self, board: Tracker, line: dict[str, Any]) -> None:
        for name in ("loss", "lr", "grad_norm", "tokens_per_second"):
            if line[name] is not None:  # of a step that was skipped
                board.add_scalar(name, line[name], line["step"])
        for source, loss in line["loss_by_source"].items():
            board.add_scalar(f"loss_by_source/{source}", loss, line["step"])

    def _end(self, board: Tracker, last: dict[str, Any], totals: dict[str, float]) -> None:
        self._draw(board, last)
        for name, value in totals.items():
            board.add_scalar(name, value, last["step"])
        board.close()

    def _politely(self, deed: Callable[[Tracker], None]) -> None:
        """Do it if the tracker opens and takes it; one warning if not, and no further try for a while."""
        if time.monotonic() < self.try_again_at:
            return
        try:
            if self.board is None:
                self.board, self.drawn = self.open()
            deed(self.board)
        except UserError:  # its package is not installed: that does not mend itself
            raise
        except Exception as error:
            self.try_again_at = time.monotonic() + SECONDS_WITHOUT_TRACKER
            if not self.told:
                why = re.sub(r"//[^/@\s]+@", "//***@", repr(error))  # the address of a server may hold a password
                say(f"warning: {self.report_to} does not take the curves of this training: {why}. The training "
                    f"goes on, and asks again now and then; every figure stands in {self.file.name}")  # fmt: skip
            self.told = True


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines so far; one that was cut off, or that a power cut filled with zeros, is dropped with all behind it."""
    path, found = directory / METRICS, []
    for text in path.read_bytes().split(b"\n")[:-1] if path.is_file() else []:
        try:
            line = json.loads(text.decode())
        except ValueError:
            break
        if not isinstance(line, dict) or "step" not in line:
            break
        found.append(line)
    return found


def steps_logged(directory: Path) -> int:
    """The steps from the first on that the metrics hold without a gap."""
    steps = [line["step"] for line in read_metrics(directory)]
    return next((number for number, step in enumerate(steps) if step != number + 1), len(steps))
