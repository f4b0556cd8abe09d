"""The lock of a GPU, held by real processes; no GPU is needed to lock one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks import gpus, launch
from tasks.errors import UserError
from tasks.execute import compute
from tasks.gpus import booked, gpus_of
from tasks.plan import Planned
from tasks.stage import Order, read_artifact
from tests.conftest import ROOT

TWO = {"device": "cuda", "processes": 2, "tag": "2xh200"}
HOLD = """
import sys, time
from tasks.gpus import booked
with booked("tasks.training", {"device": "cuda", "processes": int(sys.argv[1])}, "runs/cpt-1", print):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("STEEP_GPU_LOCKS", str(tmp_path / "locks"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    show(tmp_path, "exit 9", monkeypatch)  # the machine's own GPUs do not count
    yield


def show(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An nvidia-smi that says something else."""
    smi = folder / "bin" / "nvidia-smi"
    smi.parent.mkdir(exist_ok=True, parents=True)
    smi.write_text(f"#!/bin/sh\n{script}\n")
    smi.chmod(0o755)
    if str(smi.parent) not in os.environ["PATH"]:
        monkeypatch.setenv("PATH", f"{smi.parent}{os.pathsep}{os.environ['PATH']}")


def cards(*uuids: str) -> str:
    """A script that lists these cards as `nvidia-smi -L` does; a slice begins with MIG-."""
    lines = [f"  MIG 1g.10gb     Device  0: (UUID: {uuid})" if uuid.startswith("MIG-") else
             f"GPU {number}: NVIDIA H200 (UUID: {uuid})" for number, uuid in enumerate(uuids)]  # fmt: skip
    return "cat <<'END'\n" + "\n".join(lines) + "\nEND"


def hold(processes: int, seconds: float, visible: str = "0,1") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, str(processes), str(seconds)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": visible}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def test_who_waits_is_told_who_holds_it_and_a_killed_holder_frees_it() -> None:
    with hold(2, 600) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        waiting: list[str] = []
        got = threading.Event()

        def book() -> None:
            with booked("tasks.training", TWO, "runs/sft-2", waiting.append):
                got.set()

        thread = threading.Thread(target=book)
        thread.start()
        assert not got.wait(0.5)
        there = f"process {holder.pid} on {os.uname().nodename} (runs/cpt-1)"
        assert waiting[0].startswith(f"waiting: GPU 0 is held by {there}, since 20")
        holder.send_signal(signal.SIGKILL)
        assert got.wait(10)
        thread.join()


def test_a_lock_that_a_cleaner_removed_lets_no_two_in(tmp_path: Path) -> None:
    """Two wait for a file that is removed meanwhile; what the first one gets has to keep the second one out."""
    got, done = [threading.Event(), threading.Event()], threading.Event()

    def book(number: int) -> None:
        with booked("tasks.evaluation", TWO, f"runs/{number}", lambda _: None):
            got[number].set()
            done.wait(30)

    with booked("tasks.evaluation", TWO, "runs/cpt-1", print):
        first = threading.Thread(target=book, args=(0,))
        first.start()
        assert not got[0].wait(0.5)
        (tmp_path / "locks" / "0.lock").unlink()
    assert got[0].wait(10)
    second = threading.Thread(target=book, args=(1,))
    second.start()
    assert not got[1].wait(0.5)
    done.set()
    for thread in (first, second):
        thread.join(10)
    assert got[1].is_set()


def test_the_locks_lie_where_no_cleaner_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If all users of the machine may write there; else all of them go to the same other place."""
    monkeypatch.delenv("STEEP_GPU_LOCKS")
    monkeypatch.setattr(gpus, "LOCKS", tmp_path / "run-lock")
    elsewhere = gpus.lock_folder()
    assert elsewhere.name == "steep-gpus" and elsewhere.parent == Path(tempfile.gettempdir())
    (tmp_path / "run-lock").mkdir(mode=0o755)
    assert gpus.lock_folder() == elsewhere
    (tmp_path / "run-lock").chmod(0o1777)
    assert gpus.lock_folder() == tmp_path / "run-lock/steep-gpus"


def test_waiting_can_be_given_up() -> None:
    """As an agent does that is stopped, or whose stage has ended elsewhere."""

    def give_up() -> None:
        raise InterruptedError("stopped")

    with booked("tasks.evaluation", TWO, "runs/cpt-1", print), pytest.raises(InterruptedError, match="stopped"):
        booked("tasks.training", TWO, "runs/sft-2", print, meanwhile=give_up).__enter__()


def test_a_worker_that_inherits_it_keeps_it(tmp_path: Path) -> None:
    with booked("tasks.training", TWO, "runs/cpt-1", print) as descriptors:
        assert len(descriptors) == 2
        heir = subprocess.Popen(["sleep", "600"], pass_fds=descriptors)
    try:
        waiting: list[str] = []
        thread = threading.Thread(target=lambda: booked("tasks.evaluation", TWO, "b", waiting.append).__enter__())
        thread.start()
        thread.join(0.5)
        assert thread.is_alive() and "GPU 0" in waiting[0]
    finally:
        heir.kill()
        heir.wait()
    thread.join(10)
    assert not thread.is_alive()


def test_nobody_waits_in_a_circle() -> None:
    started = [hold(2, 0.01, visible) for _ in range(4) for visible in ("0,1", "1,0")]
    assert [process.wait(60) for process in started] == [0] * len(started)
    for process in started:
        process.stdout.close()  # type: ignore[union-attr]


def test_which_gpus_a_worker_books(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpus_of("tasks.training", TWO) == ["0", "1"]
    assert gpus_of("tasks.evaluation", TWO) == ["0"]
    assert gpus_of("tasks.preparation", TWO) == gpus_of("tasks.training", {"device": "cpu", "processes": 2}) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
    assert gpus_of("tasks.training", TWO) == ["3", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(UserError, match="'2xh200' uses 2 GPUs, and CUDA_VISIBLE_DEVICES shows 1"):
        gpus_of("tasks.training", TWO)


def test_a_gpu_whose_name_is_not_known_is_not_booked_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    show(tmp_path, "echo 'Unable to determine the device handle' >&2; exit 15", monkeypatch)
    with pytest.raises(UserError, match=r"`nvidia-smi -L` fails.*Unable to determine the device handle"):
        gpus_of("tasks.training", TWO)


def test_an_index_and_a_uuid_are_one_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    show(tmp_path, cards("GPU-aaaa-0", "GPU-aaaa-1", "GPU-bbbb-2"), monkeypatch)

    def named(visible: str | None, module: str = "tasks.evaluation") -> list[str]:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        return gpus_of(module, TWO)

    assert named("0,1", "tasks.training") == named(None, "tasks.training") == ["GPU-aaaa-0", "GPU-aaaa-1"]
    assert named("2") == named("GPU-bbbb-2") == named("GPU-b") == ["GPU-bbbb-2"]  # CUDA takes the first letters too
    assert named("GPU-b, 0", "tasks.training") == ["GPU-bbbb-2", "GPU-aaaa-0"]
    for nothing in ("GPU-aaaa", "7", "GPU-cccc", "-1,0", "NoDevFiles", ""):  # of two; of none; and none behind it
        with pytest.raises(UserError, match="shows 0"):
            named(nothing)
    with pytest.raises(UserError, match="shows 1"):
        named("0,9,1", "tasks.training")


def test_slices_of_a_card_have_locks_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    show(tmp_path, cards("GPU-aaaa-0", "MIG-cccc-1", "MIG-dddd-2", "GPU-bbbb-3"), monkeypatch)
    for visible, name in (("MIG-cccc-1", "MIG-cccc-1"), ("MIG-d", "MIG-dddd-2"), ("0", "MIG-cccc-1"),
                          ("1", "GPU-bbbb-3"), ("MIG-GPU-aaaa-0/3/0", "MIG-GPU-aaaa-0/3/0")):  # fmt: skip
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert gpus_of("tasks.evaluation", TWO) == [name]


def test_index_0_of_two_batch_jobs_is_two_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's control groups: each job sees its own card alone, as index 0; a run outside of them sees both."""
    show(tmp_path, cards("GPU-aaaa-0"), monkeypatch)
    with hold(1, 600, "0") as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        show(tmp_path, cards("GPU-bbbb-1"), monkeypatch)
        with hold(1, 600, "0") as second:
            assert second.stdout is not None and second.stdout.readline() == "held\n", "two cards, and one lock"
            show(tmp_path, cards("GPU-aaaa-0", "GPU-bbbb-1"), monkeypatch)
            with hold(1, 600, "1") as third:
                assert third.stdout is not None
                assert third.stdout.readline().startswith(f"waiting: GPU GPU-bbbb-1 is held by process {second.pid} ")
                third.kill()
            second.kill()
        first.kill()


def test_two_stages_never_share_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs at once, through the code that runs stages; the worker is a small process."""
    worker = lambda module, how: [sys.executable, "-m", "tests.tasks.worker"]  # noqa: E731
    monkeypatch.setattr(launch, "python_command", worker)
    said: list[str] = []

    def run(stage: str) -> None:
        how = {"device": "cuda", "processes": 1}
        order = Order(stage, "prepare", "tiny", {"deed": "work slowly"}, how, {})
        planned = Planned(order, order.directory(tmp_path), ("not yet run",))
        compute([planned], "tasks.training", said.append)
        spans.append((read_artifact(planned.directory)["finished_at"], time.monotonic()))

    spans: list[tuple[str, float]] = []
    began = time.monotonic()
    threads = [threading.Thread(target=run, args=(stage,)) for stage in ("cpt", "sft")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(spans) == 2 and max(end for _, end in spans) - began >= 3.0  # 1.5 s each, one after the other
    assert [line for line in said if "waiting: GPU 0 is held by process" in line]
