"""The training worker: `python -m tasks.training DIR`, or several processes of it under torchrun.

Exit codes: 0 done, 2 bad input (see `error.txt` in DIR), 75 stopped by SIGTERM or SIGINT (run it again to
resume), 76 out of memory (see `oom.json`). torchrun turns every code of a process into 1, so a stop also
leaves `preempted.txt` in DIR until the next run.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from contextlib import nullcontext, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from tasks.digests import check_unchanged
from tasks.disk import writes_told
from tasks.errors import EXIT_OOM, EXIT_PREEMPTED, EXIT_USER_ERROR, UserError
from tasks.progress import say
from tasks.stage import (
    ARTIFACT,
    ERROR,
    OOM,
    PREEMPTED,
    finish,
    is_done,
    leave_error,
    read_order,
    stage_lock,
    sweep,
    write_text,
)
from tasks.training import checkpoint
from tasks.training.preemption import Preempted, listen, preempted
from tasks.trust import declare

# transformers and TRL import these where they find them, for functions that we do not call: 2 of 7.7 s of start-up.
UNUSED = ("sklearn", "scipy", "peft")
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
RISEN = 1.1
SECONDS_FOR_RANK_0 = 30
SECONDS_TO_BE_STOPPED = 1.0  # torchrun looks after its ranks every 0.1 s
IS_MAIN = os.environ.get("RANK", "0") == "0"


def main(directory: Path) -> int:
    """Compute the stage in `directory` unless it is done."""
    listen()
    try:
        lock = stage_lock(directory, on_wait=_say_who_holds(directory)) if IS_MAIN else nullcontext()
        with writes_told(directory), lock:
            return _work(directory)
    except UserError as error:
        if IS_MAIN:
            checkpoint.clear_unfinished(directory)  # first: on a full disk it makes room for what we say
            sweep(directory)
            leave_error(directory, error)
        else:  # torchrun ends everybody as soon as one has ended: leave rank 0 the time to write
            if os.environ.get("LOCAL_RANK") == "0":  # another node's: its agent passes it on, if rank 0 has none
                print(error.render(), flush=True)
            with suppress(Preempted):
                time.sleep(SECONDS_FOR_RANK_0)
        return EXIT_USER_ERROR
    except (RuntimeError, MemoryError) as error:
        from tasks.training.full import record_full, which_is_full

        if not (which := which_is_full(error)):
            raise
        record_full(directory, which)
        return EXIT_OOM
    except Preempted:
        if (directory / ARTIFACT).is_file():  # the signal came behind the end: there is nothing to resume
            _clear(directory)
            return 0
        if IS_MAIN:
            write_text(directory / PREEMPTED, "stopped by a signal; run it again to resume\n")
            say(f"{directory.name}: stopped; run it again to resume")
        return EXIT_PREEMPTED


def _work(directory: Path) -> int:
    started_at = time.monotonic()
    order = read_order(directory)
    declare(order)
    if is_done(directory):
        _clear(directory)
        return 0
    if IS_MAIN:
        # An artifact is one of outputs that were damaged: while it stands, a signal would pass for one behind the end.
        for leftover in (ERROR, PREEMPTED, OOM, ARTIFACT):
            (directory / leftover).unlink(missing_ok=True)
        say(f"{order.stage:<14}starting")
        check_unchanged(order, directory.parent)
    backend_name = order.how.get("backend", "fsdp")
    _set_environment(unused=() if backend_name == "unsloth" else UNUSED)
    # Before transformers is imported: Unsloth has to come first.
    backend = import_module(f"tasks.training.{backend_name}")
    backend.start_process(order.how)
    from tasks.training.run import OUTPUTS, train

    counts = train(directory, order, backend)
    if IS_MAIN:
        check_unchanged(order, directory.parent)
        finish(directory, OUTPUTS, counts, time.monotonic() - started_at + counts["seconds_earlier"])
        _clear(directory)
        moved = counts["weights_moved_share"]
        say(f"{order.stage:<14}done: loss {counts['final_loss']:.3f}, {counts['tokens_per_second']:,.0f} tok/s"
            + ("" if moved is None else f", {moved:.1%} of the weights moved"))  # fmt: skip
        if warning := loss_rose(counts):
            say(f"{order.stage:<14}{warning}")
    return 0


def loss_rose(counts: dict[str, Any]) -> str:
    """A warning for a training that ends worse than it began; empty for any other. Steps differ by a few percent."""
    first, final = counts["first_loss"], counts["final_loss"]
    rose = f"the loss rose from {first:.3f} at the first step to {final:.3f} at the last: lower `learning_rate`"
    return rose if final > RISEN * first else ""


def _set_environment(unused: tuple[str, ...]) -> None:
    os.environ.update(OFFLINE)
    # Micro-batches of several widths would otherwise leave holes in a GPU's memory.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # The launcher knows whether the cores are shared; a worker that runs by hand is careful. Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for package in unused:
        sys.modules[package] = None  # type: ignore[assignment]


def _clear(directory: Path) -> None:
    """Checkpoints are for resuming; a stage that is done has its model."""
    if IS_MAIN:
        shutil.rmtree(directory / "checkpoints", ignore_errors=True)


def _tell_torchrun(error: Exception) -> None:
    """The traceback for torchrun's report, whose end, and so the end of our log, is about the rank that failed first.

    Another rank's death may be what broke us. torchrun tells us to stop then, and we leave the last word to that one.
    """
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return
    with suppress(Preempted):
        time.sleep(SECONDS_TO_BE_STOPPED)
    if not preempted():
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def _say_who_holds(directory: Path):  # type: ignore[no-untyped-def]
    return lambda holder: say(f"{directory.name} is being computed by {holder}; waiting")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tasks.training DIR")
    try:
        code = main(Path(sys.argv[1]))
    except Exception as error:
        _tell_torchrun(error)
        raise
    sys.stdout.flush()
    if code == EXIT_OOM:  # at once: the way out would wait for ranks that wait for this one
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
