"""Runs a worker in its own process group and never lets it outlive whoever started it.

    python -m tasks.guard --grace SECONDS -- COMMAND...

If our parent dies, even by SIGKILL, the kernel sends us SIGTERM; then, as on any stop signal, we send SIGTERM to the
worker's whole group, wait `--grace` seconds for it to save, and SIGKILL everything below us. As a subreaper we inherit
grandchildren whose parent died: torchrun's ranks and the flow runs of a Prefect worker stand in sessions of their own,
where no signal to a group reaches them.

Exit code: the worker's; 128 + signal number when a signal ended it; 143 when we were told to stop and it said no more;
127 or 126 when the command is not there or cannot be run.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
POLL_SECONDS = 0.05
SECONDS_AFTER_KILL = 10.0
NOT_EXECUTABLE, NOT_FOUND = 126, 127
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None  # before a fork, which must load nothing


def main(argv: list[str]) -> int:
    """Run the command; return the exit code for our caller."""
    match argv:  # argparse would be a quarter of our start-up, which every stage pays
        case ["--grace", seconds, "--", *command] if command:
            grace_seconds = float(seconds)
        case _:
            print("usage: python -m tasks.guard --grace SECONDS -- COMMAND...", file=sys.stderr)
            return 2

    stop_requested: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, _frame: stop_requested.append(received))
    parent, guard = os.getppid(), os.getpid()
    _tie_to_parent()
    if os.getppid() != parent:  # it died before the kernel knew that we care
        return 143

    # The lock's descriptor stays open below us: a stage stays locked for as long as anything computes it.
    try:
        worker = subprocess.Popen(
            command,
            start_new_session=True,
            close_fds=False,
            preexec_fn=lambda: _tie_to_guard(guard),  # noqa: PLW1509  # we have no threads
        )
    except OSError as error:  # as a shell says it
        print(f"{command[0]} cannot be started: {error.strerror}", file=sys.stderr)
        return NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
    while not has_ended(worker, POLL_SECONDS) and not stop_requested:
        pass
    _end_all(worker, grace_seconds)  # also stragglers of a worker that ended by itself: they may be saving
    code = worker.returncode
    if code is None or (stop_requested and code == -signal.SIGTERM):
        return 143
    return 128 - code if code < 0 else code


def _tie_to_guard(guard: int) -> None:
    """In the worker before it starts: a guard that was killed itself (out of memory) takes it along, in order."""
    if _libc is not None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != guard:  # it died before the kernel knew that we care
        os._exit(143)


def has_ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether a child ends within `seconds`. The kernel tells at once when it does (since Linux 5.3)."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except (AttributeError, OSError):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    else:
        try:
            select.select([descriptor], [], [], seconds)
        finally:
            os.close(descriptor)
    return process.poll() is not None


def _tie_to_parent() -> None:
    if (libc := _libc) is not None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1)


def _end_all(worker: subprocess.Popen[bytes], term_seconds: float) -> None:
    """SIGTERM to the worker's group and to orphans, once each; then SIGKILL to everything below us."""
    for number, seconds in ((signal.SIGTERM, term_seconds), (signal.SIGKILL, SECONDS_AFTER_KILL)):
        told: set[int] = set()
        deadline = time.monotonic() + seconds
        while living := _living(worker):
            if time.monotonic() > deadline:
                break
            # A rank whose torchrun lives is told by it, once it has told its other ranks what it saw.
            direct = {pid for pid, (parent, group) in living.items() if worker.pid == group or parent == os.getpid()}
            for pid in (direct if number == signal.SIGTERM else set(living)) - told:
                told.add(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            time.sleep(POLL_SECONDS)


def _living(worker: subprocess.Popen[bytes]) -> dict[int, tuple[int, int]]:
    """Parent and group of every process below us that has not ended."""
    _reap(worker)
    all_processes = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):  # noqa: PTH208  # importing pathlib takes a tenth of our start-up
        with contextlib.suppress(OSError, ValueError), open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123
            state, parent, group = stat.read().rsplit(")", 1)[1].split()[:3]  # a name may hold spaces and brackets
            if state not in "ZX":
                all_processes[int(pid)] = (int(parent), int(group))
    below, newest = {os.getpid()}, {os.getpid()}
    while newest:
        newest = {pid for pid, (parent, _) in all_processes.items() if parent in newest} - below
        below |= newest
    return {pid: all_processes[pid] for pid in below - {os.getpid()}}


def _reap(worker: subprocess.Popen[bytes]) -> None:
    """Reap what we inherited. The worker is left to Popen, which takes an exit code that someone else reaped for 0."""
    with contextlib.suppress(ChildProcessError):
        while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if ended.si_pid == worker.pid and worker.returncode is None:
                worker.poll()
            else:
                os.waitpid(ended.si_pid, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
