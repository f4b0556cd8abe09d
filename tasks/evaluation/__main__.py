"""Evaluate one model a directory: `python -m tasks.evaluation runs/evaluate_base-KEY [runs/evaluate_cpt-KEY ...]`.

Exit codes: 0 done (or was done before), 2 a mistake in the input, told in DIR/error.txt.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from tasks.digests import check_unchanged
from tasks.disk import writes_told
from tasks.errors import EXIT_USER_ERROR, UserError
from tasks.evaluation.environment import set_environment
from tasks.evaluation.heartbeat import heartbeat
from tasks.evaluation.results import OUTPUTS
from tasks.progress import say
from tasks.stage import ERROR, Order, finish, is_done, leave_error, read_order, stage_lock
from tasks.trust import declare


def main(directories: list[Path]) -> int:
    """Evaluate the stages one after the other; the first mistake in the input ends it."""
    if not directories:
        print(__doc__)
        return EXIT_USER_ERROR
    # One for the whole process: datasets reads its variable when it is imported. In the last stage's directory, where
    # it is swept when that is finished: a killed process leaves nothing in the system's temporary folder.
    folder = directories[-1] if directories[-1].is_dir() else None
    with tempfile.TemporaryDirectory(prefix=".datasets-", dir=folder, ignore_cleanup_errors=True) as cache:
        for directory in directories:
            try:
                with writes_told(directory):
                    evaluate_stage(directory, cache)
            except UserError as error:
                # The launcher follows the first directory; a look into the second should tell the same.
                for folder in {directory, directories[0]}:
                    leave_error(folder, error)
                return EXIT_USER_ERROR
    return 0


def evaluate_stage(directory: Path, cache: str) -> None:
    """Compute a stage unless it is done; holds its lock meanwhile."""
    order = read_order(directory)
    with stage_lock(directory, on_wait=lambda holder: say(f"{order.stage:<14}waiting for {holder}")):
        if is_done(directory):
            return
        (directory / ERROR).unlink(missing_ok=True)
        check_unchanged(order, directory.parent)
        set_environment(order, cache)
        declare(order)
        compute(order, directory)


def compute(order: Order, directory: Path) -> None:
    """Evaluate, and write the artifact."""
    started_at = time.monotonic()
    with heartbeat(order.stage, "loading lm-eval"):  # 7 s of torch, transformers and scikit-learn, once a process
        from tasks.evaluation.run import evaluate
    counts = evaluate(order, directory)
    check_unchanged(order, directory.parent)
    artifact = finish(directory, OUTPUTS, counts, time.monotonic() - started_at)
    say(f"{order.stage:<14}done: {counts['tasks']} tasks, {counts['samples']} samples, {artifact['seconds']:.0f} s")


if __name__ == "__main__":
    sys.exit(main([Path(argument) for argument in sys.argv[1:]]))
