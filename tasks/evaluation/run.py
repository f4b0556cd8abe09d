"""One evaluation from its order to its counts: tasks, model, one call of lm-eval, outputs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from tasks.evaluation.environment import include_path, task_names
from tasks.evaluation.heartbeat import heartbeat
from tasks.evaluation.model import WatchedLM, load_model
from tasks.evaluation.results import summarize, undefined_metrics, write_results
from tasks.evaluation.suite import Loaded, brought_by, load_suite
from tasks.progress import say
from tasks.stage import Order

SEED = 0


def evaluate(order: Order, directory: Path) -> dict[str, Any]:
    """Evaluate the order's model, write the outputs, and return the counts of the artifact."""
    started_at, names, how = time.monotonic(), task_names(order), order.how
    with heartbeat(order.stage, f"reading {len(names)} tasks"):
        manager, loaded = load_suite(names, include_path(order))
    with heartbeat(order.stage, "loading the model"):
        dtype = how.get("dtype", "float32")
        model = load_model(order.inputs["model"], order.stage, how.get("device", "cpu"), how.get("threads"), dtype)
    if dtype != "float32":
        say(f"{order.stage:<14}evaluating in {dtype}: in float32 the model and a batch do not fit the GPU")
    seconds_load = time.monotonic() - started_at

    raw = ask_lm_eval(model, manager, loaded, order.what.get("limit"))
    results = summarize(raw, brought_by(loaded))
    write_results(directory, results, raw["samples"])
    undefined = undefined_metrics(results)
    for metric in undefined:
        say(f"{order.stage:<14}no number came out for {metric}")
    return {
        "tasks": len(raw["samples"]),
        "samples": sum(len(lines) for lines in raw["samples"].values()),
        "undefined_metrics": undefined,
        "dtype": dtype,
        "seconds_load": round(seconds_load, 3),
    }


def ask_lm_eval(model: WatchedLM, manager: TaskManager, loaded: Loaded, limit: int | None) -> dict[str, Any]:
    """lm-eval's answer to all tasks at once."""
    answer: Any = simple_evaluate(
        model,
        tasks=[item for items in loaded.values() for item in items],
        task_manager=manager,
        limit=limit,
        bootstrap_iters=0,  # errors come from the logged samples, paired; lm-eval has none for a task's own aggregation
        log_samples=True,
        random_seed=SEED,
        numpy_random_seed=SEED,
        torch_random_seed=SEED,
        fewshot_random_seed=SEED,
    )
    return dict(answer)
