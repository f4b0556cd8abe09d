"""GPU memory after cancelled, killed and lost runs of both GPU pools, and one booking a GPU: `python -m pytest -m gpu`."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]
if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from tasks.gpus import VISIBLE  # noqa: E402
from tasks.stage import read_artifact  # noqa: E402
from tests.faults.house import SECONDS_TO_CANCEL, House, served_house  # noqa: E402
from tests.operations.conftest import wait_for  # noqa: E402

# A model that trains for seconds is not compiled. Unsloth takes half a minute to start, so it is not in every case.
BACKEND = "unsloth" if importlib.util.find_spec("unsloth") else "fsdp"
ROW = "device: cuda, memory_gib: {gib:.0f}, compile: false"
TAGS = f"""
one:      {{{{backend: {BACKEND}, processes: 1, work_pool: gpu-single, {ROW}}}}}
one-fsdp: {{{{backend: fsdp, processes: 1, work_pool: gpu-single, {ROW}}}}}
two:      {{{{backend: fsdp, processes: 2, work_pool: gpu-multi, {ROW}}}}}
"""
POOLS = {"one": "gpu-single", "one-fsdp": "gpu-single", "two": "gpu-multi"}
TWO = pytest.param("two", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"))
MIB_LEFT = 50  # that others may have taken meanwhile
SECONDS_UNTIL_FREE = 5.0
GUARD_SECONDS = 30.0  # the guard's grace, and its SIGKILL
TORCHRUN_SECONDS = 30.0  # that it waits between SIGTERM and SIGKILL, for ranks that wait for a dead one


@pytest.fixture(scope="module")
def house(tiny_base: Path) -> Iterator[House]:
    """One for all cases; its pools are those that `make serve` finds for this machine."""
    gib = min(nvidia_smi("memory.total")) / 1024 - 2  # no CUDA context of ours in this process
    with served_house(tiny_base, steps=400, batch_tokens=128, tags=TAGS.format(gib=gib)) as made:
        yield made


def where(tag: str) -> dict[str, str]:
    return {"deployment": f"pipeline/{POOLS[tag]}", "hardware": tag}


def num_gpus(tag: str) -> int:
    return 2 if tag == "two" else 1


def nvidia_smi(what: str) -> list[int]:
    """MiB of every card that we may use."""
    ours = [f"--id={os.environ[VISIBLE]}"] if os.environ.get(VISIBLE) else []
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits", *ours]
    return [int(line) for line in subprocess.check_output(command, text=True, timeout=30).split()]


def cards_in_use(before: list[int]) -> int:
    return sum(now > then + MIB_LEFT for now, then in zip(nvidia_smi("memory.used"), before, strict=True))


def training_processes(house: House) -> list[int]:
    """The ranks; neither torchrun nor the guard."""
    return house.world.find("-m tasks.training", without=("guard.py", "torch.distributed.run"))


def seconds_until(condition: Callable[[], object], most: float) -> float:
    began = time.monotonic()
    wait_for(condition, most)
    return time.monotonic() - began


def assert_free(house: House, before: list[int], began: float) -> None:
    """Of processes and of memory, some seconds after the processes were gone."""
    assert not house.of_a_run()
    took = seconds_until(lambda: not cards_in_use(before), SECONDS_UNTIL_FREE)
    since = time.monotonic() - began
    print(f"free after {since:.1f} s, {took:.1f} s behind its processes: {nvidia_smi('memory.used')} MiB")


@pytest.mark.parametrize("tag", ["one", TWO])
def test_every_stage_completes_in_its_pool_and_is_reused(house: House, tag: str) -> None:
    house.config(f"whole-{tag}", 40 + num_gpus(tag))
    run_id = house.complete(f"whole-{tag}", **where(tag), until="report")
    run = house.served.api(f"/flow_runs/{run_id}")
    assert run["work_pool_name"] == POOLS[tag]
    print(f"{tag}: documents to report in {run['total_run_time']:.0f} s")
    stages = {"prepare_cpt", "prepare_sft", "cpt", "sft", "evaluate", "report"}
    assert house.served.task_states(run_id) == dict.fromkeys(stages, "Completed")
    again = house.complete(f"whole-{tag}", **where(tag), until="report")
    assert house.served.task_states(again) == dict.fromkeys(stages, "Cached")
    print(f"{tag}: all reused in {house.served.api(f'/flow_runs/{again}')['total_run_time']:.1f} s")


@pytest.mark.parametrize("tag", ["one", TWO])
def test_a_cancelled_run_frees_its_gpus_and_the_next_one_resumes(house: House, tag: str, moment: random.Random) -> None:
    before = nvidia_smi("memory.used")
    run_id, directory = house.begin(f"cancelled-{tag}", 50 + num_gpus(tag), moment, **where(tag))
    assert cards_in_use(before) == num_gpus(tag) == len(training_processes(house))
    began = time.monotonic()
    house.cancel(run_id)
    took = seconds_until(lambda: not house.of_a_run(), 60)
    wait_for(lambda: house.has_ended(run_id), 60)
    print(f"{tag}: cancelled, its processes were gone after {took:.1f} s, shown as {house.state(run_id)}")
    assert house.state(run_id) == "Cancelled" and took <= SECONDS_TO_CANCEL
    assert_free(house, before, began)
    house.complete(f"cancelled-{tag}", **where(tag))
    assert read_artifact(directory)["counts"]["resumed_from"], "it started over"


@pytest.mark.parametrize("tag", ["one-fsdp", TWO])
def test_a_killed_trainer_frees_its_gpus_and_the_next_run_resumes(
    house: House, tag: str, moment: random.Random
) -> None:
    """One rank of them: the others end with it."""
    before = nvidia_smi("memory.used")
    run_id, directory = house.begin(f"killed-{tag}", 60 + num_gpus(tag), moment, **where(tag))
    ranks = training_processes(house)
    assert cards_in_use(before) == num_gpus(tag) == len(ranks)
    began = time.monotonic()
    os.kill(moment.choice(ranks), signal.SIGKILL)
    wait_for(lambda: not training_processes(house), TORCHRUN_SECONDS + 10)
    wait_for(lambda: house.has_ended(run_id) and not house.of_a_run(), 60)
    assert house.state(run_id) == "Failed" and "the end of" in house.message(run_id)
    assert_free(house, before, began)
    house.complete(f"killed-{tag}", **where(tag))
    assert read_artifact(directory)["counts"]["resumed_from"], "it started over"


def test_a_run_by_hand_and_a_scheduled_one_never_share_a_gpu(house: House) -> None:
    config = house.config("by-hand", 81)
    command = [sys.executable, "-m", "flows.pipeline", "--config", config, "--hardware", "one-fsdp", "--until", "cpt"]
    environment = os.environ | {"PYTHONPATH": f"{house.project}:{os.environ.get('PYTHONPATH', '')}",
                                "PREFECT_HOME": str(house.project / "by-hand")}  # fmt: skip
    said = house.project / "by-hand.txt"
    house.config("by-schedule", 82)
    before, most, samples = nvidia_smi("memory.used"), 0, 0
    with said.open("wb") as sink:
        by_hand = subprocess.Popen(command, cwd=house.project, env=environment, stdout=sink, stderr=sink)
    run_id = house.served.start_run(
        "pipeline/gpu-single", config="configs/by-schedule.yaml", hardware="one-fsdp", until="cpt"
    )
    while by_hand.poll() is None or not house.has_ended(run_id):
        now = len(training_processes(house))
        most, samples = max(most, now), samples + bool(now)
        assert cards_in_use(before) <= 1
        time.sleep(0.1)
    assert by_hand.returncode == 0, said.read_text()
    assert house.state(run_id) == "Completed", house.message(run_id)
    waited = said.read_text() + "\n".join(line["message"] for line in house.served.logs(run_id))
    assert "waiting: GPU" in waited, "they never met"
    assert most == 1 and samples > 10


@pytest.mark.parametrize("tag", ["one-fsdp", TWO])
def test_a_lost_worker_frees_its_gpus(house: House, tag: str, moment: random.Random) -> None:
    """Prefect's worker and its flow run vanish: the guard ends the trainer, which nobody asks to stop.

    The last cases: the pool's slot is taken until the run is shown as Crashed (test_server.py).
    """
    before = nvidia_smi("memory.used")
    house.begin(f"lost-{tag}", 70 + num_gpus(tag), moment, **where(tag))
    began = time.monotonic()
    runs = [pid for pid, line in house.of_a_run().items() if "-m tasks." not in line and "guard.py" not in line]
    house.kill(lambda line: "worker start" in line and POOLS[tag] in line)
    for pid in runs:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not house.of_a_run(), GUARD_SECONDS)
    assert_free(house, before, began)
