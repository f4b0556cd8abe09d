"""What the orchestrator costs: a pipeline under Prefect with a warm server, against the same workers run by hand.

    python -m tests.benchmarks.orchestrator [--repeats 3]        (make benchmark-orchestrator)

The workers here only copy what real ones made once, so that the difference is the orchestrator's alone: start-up and
imports, plan, digests, guards, polling, states, logs and artifacts. Fails above 3 s a pipeline or 0.5 s a stage.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tasks.stage import ARTIFACT, finish, read_artifact, read_order
from tests.conftest import laws, make_model
from tests.operations.conftest import forget, make_project, serve

MAX_SECONDS_A_PIPELINE, MAX_SECONDS_A_STAGE = 3.0, 0.5
Seconds = NDArray[np.float64]  # (2,): wall, CPU
CONFIG = "configs/regulator.yaml"
STAGES_BY_TASK = (["prepare_cpt"], ["prepare_sft"], ["cpt"], ["sft"],
                  ["evaluate_base", "evaluate_cpt", "evaluate_sft"], ["report"])  # fmt: skip
WITH_STAND_INS = """
import sys
import tasks.launch
tasks.launch.python_command = lambda module, how: [sys.executable, "-m", "tests.benchmarks.orchestrator", "--worker"]
from flows.pipeline import main
sys.exit(main(sys.argv[1:]))
"""


def main() -> int:
    """Measure and print; 1 when a limit is broken."""
    parser = argparse.ArgumentParser(prog="tests.benchmarks.orchestrator")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker", nargs="*", type=Path, help="be the stand-in worker of these directories")
    options = parser.parse_args()
    if options.worker:
        for directory in options.worker:
            copy_result(directory)
        return 0
    return measure(options.repeats)


def copy_result(directory: Path) -> None:
    """What a worker does, without its work: the outputs that a real one made, and the artifact."""
    made = directory.parent.with_name("runs.real") / directory.name
    outputs = list(read_artifact(made)["outputs"])
    for name in outputs:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(made / name, directory / name)
    assert read_order(directory).key in directory.name
    finish(directory, outputs, read_artifact(made)["counts"], 0.0)


def measure(repeats: int) -> int:
    """Real workers once; then stand-ins by hand and under Prefect, in turns."""
    texts = [str(law["text"]) for law in laws(200)] + ["The river of the town is wide."]
    with tempfile.TemporaryDirectory() as folder:
        project = make_project(make_model(Path(folder) / "base", texts))
        output = project / "serve.out"
        process, url = serve(project, output, "--pools")  # a server and no worker
        try:
            environment = {"PREFECT_API_URL": f"{url}/api", "PREFECT_HOME": str(project / ".prefect")}
            environment |= {"PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"}
            run(project, environment, "-m", "flows.pipeline", "--config", CONFIG)
            (project / "runs").rename(project / "runs.real")
            seconds = [one_round(project, environment) for _ in range(repeats)]
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)
            forget(project, output)
    return report(seconds)


def one_round(project: Path, environment: dict[str, str]) -> list[Seconds]:
    """All workers by hand, the pipeline, the report's worker by hand, the report's stage alone, importing Prefect."""
    shutil.rmtree(project / "runs", ignore_errors=True)
    flow = ("-c", WITH_STAND_INS, "--config", CONFIG)
    pipeline = run(project, environment, *flow)
    stages = {path.name.rsplit("-", 1)[0]: path for path in (project / "runs").glob("*-*") if path.is_dir()}

    (stages["report"] / ARTIFACT).unlink()
    alone = run(project, environment, *flow, "--only", "report")
    imported = run(project, environment, "-c", "import flows, prefect.flows")
    by_hand = []
    for names in STAGES_BY_TASK:
        for name in names:
            (stages[name] / ARTIFACT).unlink()
        directories = [str(stages[name]) for name in names]
        by_hand.append(run(project, environment, "-m", "tests.benchmarks.orchestrator", "--worker", *directories))
    return [np.sum(by_hand, axis=0), pipeline, by_hand[-1], alone, imported]


def run(project: Path, environment: dict[str, str], *arguments: str) -> Seconds:
    """Wall and CPU seconds of a Python process and everything below it."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    started, cpu_before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=project, env=inherited | environment, capture_output=True, check=False
    )
    wall, cpu = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr.decode()
    return np.array([wall, cpu.ru_utime + cpu.ru_stime - cpu_before.ru_utime - cpu_before.ru_stime])


def report(rounds: list[list[Seconds]]) -> int:
    """Print the medians; 1 when a limit is broken."""
    by_hand, flow, _, _, imported = np.median(np.array(rounds), axis=0)  # (2,) each: wall, CPU
    whole = np.median([one[1] - one[0] for one in rounds], axis=0)
    # Start-up cancels out between a pipeline and one stage alone.
    stage = np.median([(r[1] - r[0]) - (r[3] - r[2]) for r in rounds], axis=0) / (len(STAGES_BY_TASK) - 1)
    print(f"{'':<26}{'wall s':>8}{'CPU s':>8}")
    for name, (wall, cpu) in {"workers by hand": by_hand, "pipeline": flow, "a pipeline costs": whole,
                              "  of it Prefect's import": imported, "a stage costs": stage}.items():  # fmt: skip
        print(f"{name:<26}{wall:8.2f}{cpu:8.2f}")
    print(
        f"limits, in wall seconds of a quiet machine: {MAX_SECONDS_A_PIPELINE} a pipeline, {MAX_SECONDS_A_STAGE} a stage"
    )
    return int(whole[0] > MAX_SECONDS_A_PIPELINE or stage[0] > MAX_SECONDS_A_STAGE)


if __name__ == "__main__":
    sys.exit(main())
