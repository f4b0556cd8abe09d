"""The result table: one row a task and metric; base | CPT | SFT, and what each stage changed."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pandas as pd

from tasks.reporting.gate import judge
from tasks.reporting.gather import ROLES, RunRecord

TITLES = {"base": "Base", "cpt": "CPT", "sft": "SFT"}
CSV_COLUMNS = ["task", "metric", *ROLES]
DIFFERENCES = [(later, earlier) for earlier, later in itertools.combinations(ROLES, 2)]


def results_frame(run: RunRecord) -> pd.DataFrame:
    """Columns: side, asked, task, metric, n, higher_is_better, then base, cpt, sft, then the differences."""
    tables = {role: run.evaluation(role).json("results.json") for role in run.roles}
    sides = {name: side for side in ("general", "domain") for name in run.order.what.get(side, [])}
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for role, table in tables.items():
        for task, metrics in table["tasks"].items():
            for metric, value in metrics.items():
                row = rows.setdefault((task, metric), _row(table, sides, task, metric))
                row[role] = value
    columns = ["side", "asked", "task", "metric", "n", "higher_is_better", *ROLES]
    frame = pd.DataFrame(list(rows.values()), columns=columns)
    frame[list(ROLES)] = frame[list(ROLES)].astype("float64")  # a model or number that is not there: NaN
    for later, earlier in DIFFERENCES:
        frame[f"{later}-{earlier}"] = frame[later] - frame[earlier]
    order = {"domain": 0, "general": 1}
    return frame.sort_values("side", key=lambda side: side.map(order), kind="stable", ignore_index=True)


def gate_verdict(run: RunRecord) -> dict[str, Any] | None:
    """What the gate says of the last model; None for a run without a gate."""
    what = run.order.what
    if not what.get("gate"):
        return None
    return judge(what["gate"], run.roles[-1], results_frame(run).to_dict("records"), what["domain"] + what["general"])


def results_csv(frame: pd.DataFrame) -> str:
    """`task,metric,base,cpt,sft`; an empty field where a model was not evaluated."""
    return str(frame[CSV_COLUMNS].to_csv(index=False, lineterminator="\n"))


def is_better(difference: float, higher_is_better: bool | None) -> bool | None:
    """Whether a difference is a gain; None for none, for no number, and for a metric without a direction."""
    if higher_is_better is None or math.isnan(difference) or difference == 0:
        return None
    return (difference > 0) == higher_is_better


def _row(table: dict[str, Any], sides: dict[str, str], task: str, metric: str) -> dict[str, Any]:
    asked = table["asked"][task]  # what a group brings stands under the group's name in the config
    return {
        "side": sides[asked],  # on no side by default: the gate judges the two by different bounds
        "asked": asked,
        "task": task,
        "metric": metric,
        "n": table["n"].get(task),
        "higher_is_better": table["higher_is_better"].get(task, {}).get(metric),
    }
