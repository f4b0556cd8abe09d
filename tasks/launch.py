"""The only place that starts a worker process.

A worker runs under `tasks.guard`, writes to `worker.log` in its stage's directory (a file: a pipe would kill it with
EPIPE when we die, before it can save), and holds the stage's lock through an inherited descriptor. While it runs we
forward the lines that it means for the person who waits. How it ended becomes an exception: `UserError`, `Preempted`,
`OutOfMemory` or `WorkerFailed`.
"""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from tasks.disk import probe
from tasks.errors import EXIT_OOM, EXIT_PREEMPTED, EXIT_USER_ERROR, UserError, parse
from tasks.guard import has_ended
from tasks.nodes import meet
from tasks.oom import OutOfMemory, read_oom
from tasks.progress import MARK
from tasks.stage import ERROR, LOCK_FD_VARIABLE, LOG, MEETING_VARIABLE, OOM, PREEMPTED

GUARD = str(Path(__file__).with_name("guard.py"))
POLL_SECONDS = 0.2
TAIL_LINES = 25
NEVER_SECONDS = 10**9  # torchrun's heartbeats: a node alone hears none, and the file would grow with each
# Between SIGTERM and SIGKILL, for a checkpoint. A cancelled run of Prefect's ends within 15 s (and is killed after 30,
# when the guard must have finished); between nodes, silence and grace together stay below a minute (tasks/nodes.py).
GRACE_SECONDS, GRACE_SECONDS_UNDER_PREFECT = 20.0, 12.0
GRACE_VARIABLE = "STEEP_GRACE_SECONDS"
# No network but what a config names: no telemetry, no version checks, no hub.
QUIET = {"DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "UNSLOTH_DISABLE_STATISTICS": "1",
         "TRL_EXPERIMENTAL_SILENCE": "1", "PYTHONUNBUFFERED": "1"}  # fmt: skip
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


class WorkerFailed(RuntimeError):
    """A worker ended with an error that is not the user's; holds the last lines of its log."""

    def __init__(self, command: str, code: int, log: Path, tail: Sequence[str]) -> None:
        self.command, self.code, self.log, self.tail = command, code, log, list(tail)
        ended = f"was ended by signal {signal.Signals(code - 128).name}" if 128 < code < 160 else f"exited with {code}"
        super().__init__("\n".join([f"{command} {ended}; the end of {log}:", *(f"  | {line}" for line in tail)]))

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.command, self.code, self.log, self.tail))


class Preempted(RuntimeError):
    """A worker was told to stop and saved a checkpoint; running the same thing again resumes it."""


def run_worker(
    module: str,
    directories: Sequence[Path],
    how: dict[str, Any],
    *,
    forward: Callable[[str], None],
    lock_descriptors: Sequence[int] = (),
    hub: bool = False,
) -> None:
    """Run `python -m MODULE DIRECTORY...`, under torchrun when `how` asks for several processes, and wait for it.

    The log is that of the first directory. Raises `UserError`, `Preempted`, `OutOfMemory` or `WorkerFailed`.
    """
    log = directories[0] / LOG
    for directory in directories:
        for said in (ERROR, PREEMPTED, OOM):  # of an earlier try
            (directory / said).unlink(missing_ok=True)
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    training_how = how if module == "tasks.training" else {}
    with (
        tempfile.TemporaryDirectory(prefix="steep-") as meeting,  # readable by us alone
        meet(training_how, directories[0], forward, hub) as company,
        log.open("ab") as sink,
        log.open("r", errors="replace") as source,
    ):
        source.seek(0, os.SEEK_END)
        how = how | {"master": company.master, "meeting": meeting}
        worker = [*python_command(module, how), *map(str, directories)]
        process = start_guarded(worker, sink, worker_environment(how, lock_descriptors, hub), lock_descriptors)
        follow = _Follower(source, tail, forward)
        try:
            while not has_ended(process, POLL_SECONDS):
                follow()
                if problem := company.problem():
                    for line in (*company.tail, problem):
                        forward(line)
                    break
        finally:  # also when SIGTERM, Ctrl-C or a cancellation takes us out of the loop
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                while not has_ended(process, POLL_SECONDS):
                    company.problem()  # other nodes take silence for our end, and stop their share before it has saved
            follow(last=True)
        tail.extend(line for line in [*company.tail, company.problem()] if line)
    code = 128 - process.returncode if process.returncode < 0 else process.returncode  # the guard itself was killed
    _raise_for(code, f"{module} {directories[0].name}", directories, tail)


def start_guarded(
    worker: Sequence[str], sink: IO[bytes], environment: dict[str, str], descriptors: Sequence[int] = ()
) -> subprocess.Popen[bytes]:
    """A worker under the guard, which ends all of it on SIGTERM and when we die."""
    return subprocess.Popen(
        [sys.executable, "-S", GUARD, "--grace", str(grace_seconds()), "--", *worker],  # -S: a third of its start-up
        stdin=subprocess.DEVNULL,
        stdout=sink,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C reaches us alone, and we stop the worker in order
        env=environment,
        pass_fds=descriptors,
    )


def grace_seconds() -> float:
    """Seconds that a worker told to stop has to save: STEEP_GRACE_SECONDS, else what fits whoever started us."""
    said = os.environ.get(GRACE_VARIABLE, "")
    if not said:
        return GRACE_SECONDS_UNDER_PREFECT if "PREFECT__FLOW_RUN_ID" in os.environ else GRACE_SECONDS
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", said):
        raise UserError(f"{GRACE_VARIABLE} is {said!r}", where="the environment", allowed="seconds, as 120")
    return float(said)


def python_command(module: str, how: dict[str, Any]) -> list[str]:
    """`python -m MODULE`, or torchrun when training is spread over several processes.

    Of several nodes each runs its own; `how` then says where they meet (`master`) and which this one is (`node_rank`).
    On one node all meet in files of the folder `meeting`: a store of torch's listens on every interface, whatever
    address it is given, and torchrun unpickles what it finds there.
    """
    processes, nodes = int(how.get("processes", 1)), int(how.get("nodes", 1))
    alone = processes * nodes == 1 and how.get("offload") != "cpu"  # FSDP2 offloads, and wants torchrun
    if module != "tasks.training" or alone:
        return [sys.executable, "-m", module]
    if nodes == 1:
        place = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{how['meeting']}/torchrun", "--log-dir", how["meeting"],
                 "--rdzv-conf", f"store_type=file,keep_alive_interval={NEVER_SECONDS}"]  # fmt: skip
    else:  # static: node 0, which holds the stage's lock, has rank 0 whoever comes first
        host, _, port = how["master"].rpartition(":")
        place = ["--nnodes", str(nodes), "--node-rank", str(how.get("node_rank", 0)),
                 "--rdzv-backend", "static", "--master-addr", host, "--master-port", port]  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", *place, "--nproc-per-node", str(processes)]
    return [*launcher, "-m", module]


def worker_environment(how: dict[str, Any], lock_descriptors: Sequence[int], hub: bool) -> dict[str, str]:
    """Our environment, silenced; offline unless the config names the hub."""
    environment = {**os.environ, **QUIET} | ({} if hub else OFFLINE)
    environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(math.ceil(grace_seconds()))  # torchrun's, for its ranks
    environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # as nvidia-smi counts GPUs, and our locks; nobody else's count
    threads = how.get("threads") or max(1, (os.cpu_count() or 1) // int(how.get("processes", 1)))
    if how.get("device") == "cpu":
        environment["OMP_NUM_THREADS"] = str(threads)
        if threads > 1:
            environment.setdefault("OMP_WAIT_POLICY", "ACTIVE" if _cores_are_idle() else "PASSIVE")
    if "meeting" in how and how.get("nodes", 1) == 1:
        environment[MEETING_VARIABLE] = how["meeting"]
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # torchrun would open one for its ranks, unasked
    if lock_descriptors:
        environment[LOCK_FD_VARIABLE] = str(lock_descriptors[0])
    return environment


def _cores_are_idle(seconds: float = 0.05) -> bool:
    """Whether nobody else computes here now.

    Threads that spin while they wait train the example at 5,900 tokens/s on two quiet cores, threads that sleep at
    2,700; on busy cores spinning threads starve each other (200 tokens/s were seen). No bit of a result depends on it.
    """
    stat = Path("/proc/stat")
    if not stat.exists():
        return False
    before = [int(field) for field in stat.read_text().split("\n", 1)[0].split()[1:]]
    time.sleep(seconds)
    spent = [int(f) - b for f, b in zip(stat.read_text().split("\n", 1)[0].split()[1:], before, strict=True)]
    return spent[3] + spent[4] >= 0.8 * sum(spent)  # idle and waiting for a disk


class _Follower:
    """Reads what a worker appended to its log; forwards the marked lines and keeps the last ones."""

    def __init__(self, source: Any, tail: deque[str], forward: Callable[[str], None]) -> None:
        self.source, self.tail, self.forward, self.rest = source, tail, forward, ""

    def __call__(self, last: bool = False) -> None:
        *lines, self.rest = (self.rest + self.source.read()).split("\n")
        if last:
            lines.append(self.rest)
        for line in lines:
            line = line.rsplit("\r", 1)[-1].rstrip()  # a redrawn bar: its last state
            head, mark, text = line.partition(MARK)  # a bar without an end of line may stand before it
            if mark:
                self.forward(text)
            elif head:
                self.tail.append(head)


def _raise_for(code: int, command: str, directories: Sequence[Path], tail: Sequence[str]) -> None:
    """What the exit code means; torchrun turns every code into 1, so what a worker wrote down counts first."""
    if code == 0:
        return
    log = directories[0] / LOG
    for error in (directory / ERROR for directory in directories):
        if error.exists():
            raise parse(error.read_text())
    records = [record for directory in directories if (record := read_oom(directory))]
    if records or code == EXIT_OOM:
        raise OutOfMemory(records[0] if records else {})
    if told := probe(directories[0]):  # the disk did not even take its last words
        raise told
    if code == EXIT_USER_ERROR:
        raise UserError(f"the input was refused; see {log}")
    if code == EXIT_PREEMPTED or any((directory / PREEMPTED).exists() for directory in directories):
        raise Preempted(f"{command} was stopped and can be resumed; run the same command again")
    raise WorkerFailed(command, code, log, tail)
