"""A pipeline without Prefect: `python -m tests.faults.drive CONFIG TAG STAGE...`, stages by their group (cpt, evaluate, ...).

The same `compute` that Prefect's tasks call, so what a fault does to workers, guard and stages is the same and a case takes
seconds. Exit codes as those of `flows.pipeline`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tasks.config import load_config, load_hardware
from tasks.errors import EXIT_PREEMPTED, EXIT_USER_ERROR, UserError
from tasks.execute import compute
from tasks.launch import Preempted, WorkerFailed
from tasks.plan import make_plan

MODULES = {
    "prepare": "preparation",
    "cpt": "training",
    "sft": "training",
    "evaluate": "evaluation",
    "report": "reporting",
}


def main(config: Path, tag: str, groups: list[str]) -> int:
    """Compute the groups; returns the exit code."""
    try:
        plan = make_plan(load_config(config), config, tag, load_hardware(tag))
        for group in groups:
            stages = [planned for planned in plan.values() if planned.group == group]
            together = [stages] if group == "evaluate" else [[stage] for stage in stages]
            for some in together:
                compute(some, f"tasks.{MODULES[group]}", lambda line: print(line, flush=True))
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_USER_ERROR
    except Preempted as stopped:
        print(stopped, file=sys.stderr)
        return EXIT_PREEMPTED
    except WorkerFailed as failed:
        print(failed, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
