"""What stages left behind, as rows for a table: plan, ledger, mix, metrics, facts of a training."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

from tasks.plan import Planned
from tasks.stage import read_artifact
from tasks.training.metrics import read_metrics

Rows = list[dict[str, Any]]


def plan(stages: dict[str, Planned]) -> Rows:
    """One row a stage: what happens to it and why."""
    return [
        {"stage": name, "does": "reuse" if p.reused else "resume" if p.resumes else "run",
         "why": "; ".join(p.reasons), "directory": str(p.directory)}
        for name, p in stages.items()
    ]  # fmt: skip


def ledger(directory: Path) -> Rows:
    """Tokens by source, from read to trained."""
    sources = json.loads((directory / "ledger.json").read_text())["sources"]
    return [
        {"source": source}
        | {step: f"{entry[step].get('tokens', 0):,}" for step in entry
           if isinstance(entry[step], dict) and "tokens" in entry[step]}
        for source, entry in sources.items()
    ]  # fmt: skip


def mix(directory: Path) -> Rows:
    """Shares asked for and achieved, by source."""
    sources = json.loads((directory / "mix.json").read_text())["sources"]
    return [
        {"source": name, "role": entry.get("role", ""), "asked": f"{entry['asked']:.2%}",
         "achieved": f"{entry['achieved']:.2%}", "tokens": f"{entry['tokens']:,}", "epochs": f"{entry['epochs']:.2f}"}
        for name, entry in sources.items()
    ]  # fmt: skip


def evaluations(directories: list[Path]) -> Rows:
    """Task x metric, one column a model."""
    table: dict[tuple[str, str], dict[str, Any]] = {}
    for directory in directories:
        role = directory.name.split("-")[0].removeprefix("evaluate_")
        for task, metrics in json.loads((directory / "results.json").read_text())["tasks"].items():
            for metric, value in metrics.items():
                if isinstance(value, int | float):
                    table.setdefault((task, metric), {})[role] = f"{value:.4f}"
    return [{"task": task, "metric": metric, **values} for (task, metric), values in table.items()]


def results_csv(directory: Path) -> Rows:
    """The result table of the report."""
    with (directory / "results.csv").open() as file:
        return [{name: _rounded(value) for name, value in row.items()} for row in csv.DictReader(file)]


def loss_curve(directory: Path) -> tuple[list[float], list[float]]:
    """Steps and losses of a training, which may still run."""
    points = [
        (float(line["step"]), float(line["loss"])) for line in read_metrics(directory) if line["loss"] is not None
    ]
    return [step for step, _ in points], [loss for _, loss in points]


def training_facts(directory: Path) -> list[tuple[str, str]]:
    """What one asks first about a training."""
    artifact = read_artifact(directory)
    counts = artifact["counts"]
    return [
        ("steps", f"{counts['steps']:,}"),
        ("tokens", f"{counts['tokens']:,}"),
        *([("steps skipped", f"{len(skipped):,}")] if (skipped := counts.get("skipped_steps")) else []),
        ("final loss", f"{counts['final_loss']:.4f}"),
        ("tokens a second", f"{counts['tokens_per_second']:,.0f}"),
        *([("weights that moved", f"{moved:.1%}")] if (moved := counts["weights_moved_share"]) is not None else []),
        ("seconds", f"{artifact['seconds']:,.0f}"),
    ]


def training_so_far(directory: Path) -> list[tuple[str, str]]:
    """What one asks first about a training that runs, or did not reach its end."""
    lines = read_metrics(directory)
    tokens, seconds = sum(line["tokens"] for line in lines), sum(line["seconds"] for line in lines)
    losses = [line["loss"] for line in lines if line["loss"] is not None]
    return [
        ("steps so far", f"{len(lines):,}"),
        ("tokens so far", f"{tokens:,}"),
        *([("last loss", f"{losses[-1]:.4f}")] if losses else []),
        ("tokens a second", f"{tokens / (seconds or math.inf):,.0f}"),
    ]


def _rounded(value: str) -> str:
    try:
        return f"{float(value):.4f}"
    except ValueError:
        return value
