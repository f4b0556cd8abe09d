"""Evaluate one model a directory: `python -m tasks.evaluation runs/evaluate_base-KEY [runs/evaluate_cpt-KEY ...]`.

Exit codes: 0 done (or was done before), 2 a mistake in the input, told in DIR/error.txt.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tasks.errors import EXIT_USER_ERROR, UserError
from tasks.evaluation.environment import include_path, set_environment, task_names
from tasks.evaluation.heartbeat import heartbeat
from tasks.progress import say
from tasks.stage import ERROR, Order, finish, is_done, read_order, stage_lock, write_text

SEED = 0


def main(directories: list[Path]) -> int:
    """Evaluate the stages one after the other; the first mistake in the input ends it."""
    if not directories:
        print(__doc__)
        return EXIT_USER_ERROR
    # One for the whole process: datasets reads its variable when it is imported.
    with tempfile.TemporaryDirectory(prefix="steep-datasets-") as cache:
        for directory in directories:
            try:
                evaluate_stage(directory, cache)
            except UserError as error:
                # The launcher follows the first directory; a look into the second should tell the same.
                for folder in {directory, directories[0]}:
                    if folder.is_dir():
                        write_text(folder / ERROR, error.render() + "\n")
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
        set_environment(order, cache)
        compute(order, directory)


def compute(order: Order, directory: Path) -> None:
    """Load tasks and model, ask lm-eval once, write the outputs."""
    started_at = time.monotonic()
    with heartbeat(order.stage, "loading lm-eval"):  # 7 s of torch, transformers and scikit-learn
        from lm_eval.evaluator import simple_evaluate

        from tasks.evaluation import model, results, suite
    names = task_names(order)
    with heartbeat(order.stage, f"reading {len(names)} tasks"):
        manager, loaded = suite.load_suite(names, include_path(order))
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


if __name__ == "__main__":
    sys.exit(main([Path(argument) for argument in sys.argv[1:]]))
