"""Evaluate one model a directory: `python -m tasks.evaluation runs/evaluate_base-KEY [runs/evaluate_cpt-KEY ...]`.

Exit codes: 0 done (or was done before), 2 a mistake in the input, told in DIR/error.txt.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tasks.errors import EXIT_USER_ERROR, UserError
from tasks.evaluation.heartbeat import heartbeat
from tasks.progress import say
from tasks.stage import ERROR, Order, finish, is_done, read_order, stage_lock, write_text

SEED = 0
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
QUIET = {"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}


def main(directories: list[Path]) -> int:
    """Evaluate the stages one after the other; the first mistake in the input ends it."""
    if not directories:
        print(__doc__)
        return EXIT_USER_ERROR
    # One for the whole process: datasets reads the variable at its import. The cache of a local data file is keyed by its
    # time of change and outlives a run; a fresh one is never stale.
    with tempfile.TemporaryDirectory(prefix="steep-datasets-") as cache:
        for directory in directories:
            try:
                evaluate_stage(directory, cache)
            except UserError as error:
                if directory.is_dir():
                    write_text(directory / ERROR, error.render() + "\n")
                print(error.render(), flush=True)
                return EXIT_USER_ERROR
    return 0


def evaluate_stage(directory: Path, cache: str) -> None:
    """Compute a stage unless it is done; holds its lock meanwhile."""
    order = read_order(directory)
    with stage_lock(directory, on_wait=lambda holder: say(f"{order.stage:<14}waiting for {holder}")):
        if is_done(directory):
            return
        (directory / ERROR).unlink(missing_ok=True)
        set_environment(uses_hub(order), cache)
        compute(order, directory)


def compute(order: Order, directory: Path) -> None:
    """Load tasks and model, ask lm-eval once, write the outputs."""
    started_at = time.monotonic()
    with heartbeat(order.stage, "loading lm-eval"):  # 7 s of torch, transformers and scikit-learn
        from lm_eval.evaluator import simple_evaluate

        from tasks.evaluation import model, results, suite
    names = [name for side in order.what["tasks"].values() for name in side]
    names = list(dict.fromkeys(names))
    with heartbeat(order.stage, f"reading {len(names)} tasks"):
        manager, loaded = suite.load_suite(names, order.inputs.get("include_path", "configs/lm_eval"))
    with heartbeat(order.stage, "loading the model"):
        lm = model.load_model(
            order.inputs["model"], order.stage, order.how.get("device", "cpu"), order.how.get("threads")
        )
    seconds_load = time.monotonic() - started_at
    random.seed(SEED)
    raw: Any = simple_evaluate(
        lm,
        tasks=[item for items in loaded.values() for item in items],
        task_manager=manager,
        limit=order.what.get("limit"),
        bootstrap_iters=0,  # errors come from the logged samples, paired; lm-eval's have none for own aggregations
        log_samples=True,
        random_seed=SEED,
        numpy_random_seed=SEED,
        torch_random_seed=SEED,
        fewshot_random_seed=SEED,
    )
    asked = {task.task_name: name for name, items in loaded.items() for task in suite.leaves(items)}
    table = results.summarize(raw, asked)
    results.write_results(directory, table, raw["samples"])
    undefined = results.undefined_metrics(table)
    for metric in undefined:
        say(f"{order.stage:<14}no number came out for {metric}")
    counts = {
        "tasks": len(raw["samples"]),
        "samples": sum(len(lines) for lines in raw["samples"].values()),
        "undefined_metrics": undefined,
        "seconds_load": round(seconds_load, 3),
    }
    artifact = finish(directory, [results.RESULTS, results.SAMPLES], counts, time.monotonic() - started_at)
    say(f"{order.stage:<14}done: {counts['tasks']} tasks, {counts['samples']} samples, {artifact['seconds']:.0f} s")


def set_environment(hub: bool, cache: str) -> None:
    """Before the first import of a Hugging Face library: no network unless the order names the hub."""
    os.environ.update(QUIET)
    if not hub:
        os.environ.update(OFFLINE | {"HF_DATASETS_CACHE": cache})


def uses_hub(order: Order) -> bool:
    """Whether the run's file names the hub for its model."""
    return bool(order.what["model"].get("hub") or order.how.get("hub"))


if __name__ == "__main__":
    sys.exit(main([Path(argument) for argument in sys.argv[1:]]))
