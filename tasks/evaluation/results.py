"""lm-eval's answer -> `results.json` and `samples/<task>.jsonl`: plain JSON, fixed order, no times or paths.

A metric keeps its name; one that comes from a named filter of the task is `metric,filter`. A sample's value may be a
list (a metric with its own aggregation, such as micro F1 or bits per byte): what the aggregation takes, so that a
bootstrap can recompute the figure from any choice of samples.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tasks.stage import write_json

RESULTS, SAMPLES = "results.json", "samples"
OUTPUTS = (RESULTS, SAMPLES)
NO_METRIC = {"name", "alias", "sample_len", "sample_count", " "}


def summarize(raw: dict[str, Any], asked: dict[str, str]) -> dict[str, Any]:
    """The content of `results.json`; `asked`: task or group -> the name in the run's file that brought it."""
    tasks = {name: _metrics(values) for name, values in raw["results"].items()}
    tasks = {name: metrics for name, metrics in tasks.items() if metrics}
    return {
        "tasks": tasks,
        "n": {name: _num_samples(raw, name) for name in tasks},
        "higher_is_better": {
            name: {metric: _direction(raw, name, metric) for metric in metrics} for name, metrics in tasks.items()
        },
        "asked": {name: asked[name] for name in tasks},
    }


def undefined_metrics(results: dict[str, Any]) -> list[str]:
    """Metrics without a number, as `task metric`."""
    return [
        f"{task} {metric}" for task, metrics in results["tasks"].items() for metric, v in metrics.items() if v is None
    ]


def sample_lines(logged: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One plain record a document, in the task's order. Filters of one document are merged."""
    merged: dict[int, dict[str, Any]] = {}
    for sample in sorted(logged, key=lambda s: s["doc_id"]):  # stable: filters keep their order
        line = merged.setdefault(sample["doc_id"], _first_part(sample))
        for metric in sample["metrics"]:
            line["metrics"][_metric_name(f"{metric},{sample['filter']}")] = plain(sample[metric])
    return list(merged.values())


def write_results(directory: Path, results: dict[str, Any], logged: dict[str, list[dict[str, Any]]]) -> None:
    """Write `samples/` aside and rename it, then `results.json`."""
    aside = directory / f".{SAMPLES}.{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for task, samples in logged.items():
        _write_lines(aside / f"{file_name(task)}.jsonl", sample_lines(samples))
    shutil.rmtree(directory / SAMPLES, ignore_errors=True)  # of a run that was killed before its artifact
    aside.rename(directory / SAMPLES)
    write_json(directory / RESULTS, results)


def file_name(task: str) -> str:
    """A task's name as a file's name."""
    return task.replace(os.sep, "_")


def plain(value: Any) -> Any:
    """The value as JSON knows it; a number that is none (NaN, infinity) becomes null."""
    if hasattr(value, "tolist"):  # numpy and torch
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((plain(item) for item in value), key=str)
    return [plain(item) for item in value] if isinstance(value, Iterable) else str(value)


def _metrics(values: dict[str, Any]) -> dict[str, float | None]:
    """`{"acc,none": 0.5, "acc_stderr,none": "N/A", "alias": ...}` -> `{"acc": 0.5}`."""
    return {
        _metric_name(key): None if isinstance(value, str) else plain(value)
        for key, value in values.items()
        if key not in NO_METRIC and not key.split(",")[0].endswith("_stderr")
    }


def _metric_name(key: str) -> str:
    return key.removesuffix(",none")


def _direction(raw: dict[str, Any], task: str, metric: str) -> bool | None:
    found = raw["higher_is_better"].get(task, {}).get(metric.split(",")[0])
    return found if isinstance(found, bool) else None


def _num_samples(raw: dict[str, Any], task: str) -> int:
    said = raw.get("n-samples", {}).get(task)
    return int(said["effective"]) if said else int(raw["results"][task].get("sample_len", 0))


def _first_part(sample: dict[str, Any]) -> dict[str, Any]:
    prompt = sample["arguments"][0][0]
    responses = plain(sample["filtered_resps"])
    return {
        "doc_id": sample["doc_id"],
        "prompt": None if prompt == sample["target"] else plain(prompt),  # a scored document is its own target
        "target": plain(sample["target"]),
        "response": responses[0] if len(responses) == 1 else responses,
        "metrics": {},
    }


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines), encoding="utf-8")
