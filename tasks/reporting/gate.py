"""The gate's verdict: the last model of a run against its base, metric by metric. Standard library only.

A domain metric must gain at least `min_domain_gain`, a general one may lose at most `max_general_drop`, both in the
task's own metric and in the direction that is better. What was not measured does not pass: a metric without a number
for one of the two models, a task without a metric that has a direction. The verdict is told and moves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tasks.stage import ARTIFACT, read_artifact

PASSED, NOT_PASSED = "passed", "not passed"
ROUNDING = 1e-9  # 0.82 - 0.80 is a little less than 0.02


def judge(bounds: dict[str, float], model: str, rows: Iterable[dict[Any, Any]], tasks: Sequence[str]) -> dict[str, Any]:
    """The verdict on a model over the rows of the result table, with every comparison that decided it.

    `tasks` are those that the run's file names; each must have brought a metric to compare.
    """
    directed = [row for row in rows if isinstance(row["higher_is_better"], bool)]
    compared = [_compare(row, model, bounds) for row in directed]
    silent = [task for task in tasks if task not in {row["asked"] for row in directed}]
    compared += [{"task": task, "metric": None, "gain": None, "bound": None, "passes": False} for task in silent]
    verdict = PASSED if all(row["passes"] for row in compared) else NOT_PASSED
    return {"verdict": verdict, "model": model, **bounds, "compared": compared}


def read_verdict(directory: Path) -> dict[str, Any] | None:
    """The verdict that a report's artifact holds; None for a run without a gate."""
    if not (directory / ARTIFACT).is_file():
        return None
    verdict: dict[str, Any] | None = read_artifact(directory)["counts"].get("gate")
    return verdict


def say_verdict(verdict: dict[str, Any]) -> str:
    """The verdict in one line, without a name of the data's or the tasks'."""
    missed, compared = len(missed_by(verdict)), len(verdict["compared"])
    share = f"{missed} of {compared} metrics miss their bound" if missed else f"all {compared} metrics keep their bound"
    return (
        f"gate {verdict['verdict']}: {share}, {verdict['model'].upper()} against base "
        f"(min_domain_gain {verdict['min_domain_gain']:g}, max_general_drop {verdict['max_general_drop']:g})"
    )


def missed_by(verdict: dict[str, Any]) -> list[dict[str, Any]]:
    """The comparisons that did not pass."""
    return [row for row in verdict["compared"] if not row["passes"]]


def _compare(row: dict[Any, Any], model: str, bounds: dict[str, float]) -> dict[str, Any]:
    change = row[model] - row["base"]
    gain = change if row["higher_is_better"] else -change
    bound = -bounds["max_general_drop"] if row["side"] == "general" else bounds["min_domain_gain"]
    passes = gain >= bound - ROUNDING  # no number passes no comparison: NaN is not at least anything
    return {"task": row["task"], "metric": row["metric"], "gain": None if math.isnan(gain) else gain, "bound": bound,
            "passes": bool(passes)}  # fmt: skip
