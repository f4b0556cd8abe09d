"""Memory that ran out all the same: what the worker wrote down, and what to do about it.

The worker leaves `oom.json` (measured_gib, predicted_gib, microbatch_rows, step, memory: gpu or host) and exits with
76. With `on_oom: retry` the stage goes on from its last checkpoint at half the micro-batch; the batch of a step stays
what it was, because the layout spreads it over more micro-batches. Else, or at one row, the person decides; also where
the host's memory was full, of which a smaller micro-batch takes as much (but for Unsloth's recomputation).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tasks.choose import Choice, predicted
from tasks.errors import UserError
from tasks.stage import OOM

# The recompute that keeps less; Unsloth's keeps least.
LESS = {"none": "pointwise", "pointwise": "selective", "selective": "full"}


class OutOfMemory(RuntimeError):
    """A worker ran out of memory; `record` is what `oom.json` says."""

    def __init__(self, record: dict[str, Any]) -> None:
        super().__init__(f"out of memory: {record}")
        self.record = record

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.record,))


def read_oom(directory: Path) -> dict[str, Any] | None:
    """What a worker wrote before it gave up; None where it did not."""
    path = directory / OOM
    return json.loads(path.read_text()) if path.is_file() else None


def next_rows(how: dict[str, Any], record: dict[str, Any]) -> int | None:
    """The micro-batch to try after one that did not fit; None when there is none, it helps not, or nobody asked."""
    rows = int(how.get("microbatch_rows", 1))
    if _of_the_host(record) and how.get("recompute") != "unsloth":
        return None
    return rows // 2 if how.get("on_oom") == "retry" and rows > 1 else None


def with_rows(choice: Choice | None, rows: int) -> dict[str, Any]:
    """What the order says of another micro-batch, its prediction too."""
    if choice is None or choice.job is None or choice.parts is None:
        return {"microbatch_rows": rows}
    return predicted(choice.hardware.model_copy(update={"microbatch_rows": rows}), choice.job).how


def describe(stage: str, record: dict[str, Any]) -> str:
    """`cpt ran out of GPU memory at step 12 with 4 rows a micro-batch: 138.0 GiB were taken, 121.5 GiB planned`."""
    at = f" at step {record['step']}" if record.get("step") is not None else ""
    rows = f" with {say_rows(record['microbatch_rows'])}" if record.get("microbatch_rows") else ""
    measured, predicted = record.get("measured_gib"), record.get("predicted_gib")
    host = _of_the_host(record)
    whose, by, of = ("the machine's own", " by one process", " for all") if host else ("GPU", "", "")
    taken = f"{measured:.1f} GiB were taken{by}" if measured else "what it took is not known"
    planned = f"{predicted:.1f} GiB were planned{of}" if predicted else "nothing was planned"
    return f"{stage} ran out of {whose} memory{at}{rows}: {taken}, {planned}"


def _of_the_host(record: dict[str, Any]) -> bool:
    return record.get("memory") == "host"


def say_rows(rows: int) -> str:
    """`4 rows a micro-batch`."""
    return f"{rows} row{'s' if rows != 1 else ''} a micro-batch"


def _smaller(how: dict[str, Any]) -> list[str]:
    """Each setting of a row that takes less, alone."""
    rows, recompute = int(how.get("microbatch_rows", 1)), how.get("recompute", "none")
    less = LESS | ({} if how.get("compile") else {"none": "selective"})
    less |= {"full": "unsloth"} if how.get("backend") == "unsloth" else {}
    steps = [f"microbatch_rows: {rows // 2}"] if rows > 1 else []
    if recompute in less:
        steps.append(f"recompute: {less[recompute]}")
    if how.get("device") == "cuda" and how.get("offload") != "cpu":  # the 8-bit optimizer does not run in host memory
        if how.get("precision") in ("fp32", "fp32-master", "bf16"):
            steps.append("precision: bf16-stochastic")
        if how.get("backend") == "fsdp":
            rounded = how.get("precision") == "bf16-stochastic"
            steps.append("offload: cpu" + (" with precision: fp32-master" if rounded else ""))
    return steps


def refusal(stage: str, record: dict[str, Any], how: dict[str, Any]) -> UserError:
    """The error of a stage that does not go on by itself, with the next setting."""
    if _of_the_host(record):
        return _refusal_of_the_host(stage, record, how)
    allowed = ", or ".join(_smaller(how)) or "nothing smaller on this machine: take more GPUs, or larger ones"
    retry = "" if how.get("on_oom") == "retry" else "; with `on_oom: retry` the stage halves its micro-batch by itself"
    return UserError(
        describe(stage, record),
        where=f"the row of '{how.get('tag', '?')}' in configs/hardware.yaml",
        allowed=allowed,
        todo=f"change the row and run the same command again: it goes on from the last checkpoint{retry}",
    )


def _refusal_of_the_host(stage: str, record: dict[str, Any], how: dict[str, Any]) -> UserError:
    offloads = how.get("offload") == "cpu"
    less = ["more nodes", "GPUs that hold it without offload: cpu"] if offloads else []
    less += ["recompute: full"] if how.get("recompute") == "unsloth" else []
    return UserError(
        describe(stage, record),
        where=f"the row of '{how.get('tag', '?')}' in configs/hardware.yaml, and what else runs on the machine",
        allowed=", or ".join([*less, "a machine, container or batch job with more memory"]),
        todo="make room and run the same command again: it goes on from the last checkpoint",
    )
