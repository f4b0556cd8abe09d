"""Runs a worker in its own process group and never lets it outlive whoever started it.

    python -m tasks.guard --grace SECONDS -- COMMAND...

If our parent dies, even by SIGKILL, the kernel sends us SIGTERM; then, as on any stop signal, we send SIGTERM to the
worker's whole group, wait `--grace` seconds for it to save, and SIGKILL what is left. As a subreaper we also inherit
grandchildren whose parent died, so that torchrun's ranks cannot escape.

Exit code: the worker's; 128 + signal number when a signal ended it; 143 when we were told to stop and it said no more.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import time

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
POLL_SECONDS = 0.05
SECONDS_FOR_STRAGGLERS = 5.0  # of the group, once the worker itself has ended
SECONDS_AFTER_KILL = 10.0


def main(argv: list[str]) -> int:
    """Run the command; return the exit code for our caller."""
    parser = argparse.ArgumentParser(prog="tasks.guard", description="run a command that never outlives its starter")
    parser.add_argument("--grace", type=float, default=20.0, help="seconds between SIGTERM and SIGKILL")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(argv)

    stop_requested: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, _frame: stop_requested.append(received))
    parent = os.getppid()
    _tie_to_parent()
    if os.getppid() != parent:  # it died before the kernel knew that we care
        return 143

    # The lock's descriptor stays open below us: a stage stays locked for as long as anything computes it.
    worker = subprocess.Popen(options.command, start_new_session=True, close_fds=False)
    while worker.poll() is None and not stop_requested:
        time.sleep(POLL_SECONDS)
    _end_group(worker, options.grace if stop_requested else SECONDS_FOR_STRAGGLERS)
    code = worker.returncode
    if code is None or (stop_requested and code == -signal.SIGTERM):
        return 143
    return 128 - code if code < 0 else code


def _tie_to_parent() -> None:
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1)


def _end_group(worker: subprocess.Popen[bytes], term_seconds: float) -> None:
    for number, seconds in ((signal.SIGTERM, term_seconds), (signal.SIGKILL, SECONDS_AFTER_KILL)):
        try:
            os.killpg(worker.pid, number)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not _group_lives(worker):
                return
            time.sleep(POLL_SECONDS)


def _group_lives(worker: subprocess.Popen[bytes]) -> bool:
    worker.poll()  # first, or the loop below would take its exit code away
    while True:  # reap grandchildren that we inherited: a zombie still counts as a member of its group
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                break
        except ChildProcessError:
            break
    try:
        os.killpg(worker.pid, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
