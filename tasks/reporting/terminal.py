"""Result table and gate's verdict for the terminal: aligned text. Standard library only, since the flow imports it."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

from tasks.reporting.gate import missed_by, read_verdict, say_verdict
from tasks.stage import read_order

HEADINGS = ("task", "metric", "better", "base", "CPT", "SFT", "CPT-base", "SFT-base", "SFT-CPT")
NUM_TEXT_COLUMNS = 3


def result_table_text(directory: Path) -> str:
    """The result table of a report's directory, as lines of text; below it the gate's verdict, if there is a gate."""
    with (directory / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return "nothing was evaluated"
    directions = _directions(directory)
    cells = [HEADINGS] + [_line(row, directions) for row in rows]
    return "\n".join([_aligned([line for line in cells if line]), *_gate_lines(directory)])


def _gate_lines(directory: Path) -> list[str]:
    verdict = read_verdict(directory)
    if verdict is None:
        return []
    missed = [f"  {row['task']} {_why_missed(row)}" for row in missed_by(verdict)]
    return ["", say_verdict(verdict), *missed]


def _why_missed(row: dict[str, Any]) -> str:
    if row["metric"] is None:
        return "has no metric with a direction"
    gain = "no number" if row["gain"] is None else f"gain {row['gain']:+,.4f}"
    return f"{row['metric']}: {gain}, at least {row['bound']:+,.4f}"


def _line(row: dict[str, str], directions: dict[tuple[str, str], bool | None]) -> tuple[str, ...]:
    base, cpt, sft = (float(row[role]) if row[role] else float("nan") for role in ("base", "cpt", "sft"))
    higher = directions.get((row["task"], row["metric"]))
    better = "" if higher is None else "higher" if higher else "lower"
    numbers = [
        *(_number(v, "") for v in (base, cpt, sft)),
        *(_number(v, "+") for v in (cpt - base, sft - base, sft - cpt)),
    ]
    return (row["task"], row["metric"], better, *numbers)


def _number(value: float, sign: str) -> str:
    return "-" if math.isnan(value) else f"{value:{sign},.4f}" if abs(value) < 100 else f"{value:{sign},.1f}"


def _aligned(lines: list[tuple[str, ...]]) -> str:
    filled = [i for i in range(len(lines[0])) if any(line[i] not in ("", "-") for line in lines[1:])]
    widths = {i: max(len(line[i]) for line in lines) for i in filled}
    text = [
        "  ".join(
            line[i].ljust(widths[i]) if i < NUM_TEXT_COLUMNS else line[i].rjust(widths[i]) for i in filled
        ).rstrip()
        for line in lines
    ]
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:]])


def _directions(directory: Path) -> dict[tuple[str, str], bool | None]:
    found: dict[tuple[str, str], bool | None] = {}
    for name, path in read_order(directory).inputs.items():
        results = Path(path) / "results.json"
        if name.startswith("evaluate_") and results.is_file():
            for task, metrics in json.loads(results.read_text())["higher_is_better"].items():
                found |= {(task, metric): higher for metric, higher in metrics.items()}
    return found
