"""Prefect's temporary server ends with the flow that started it, however that ends.

Prefect stops it when the interpreter exits in order; a flow ended by SIGTERM or SIGKILL left it running, 200 MB each.
So a small process waits for us to be gone: it holds the reading end of a pipe that the kernel closes with us, and the
server by its descriptor, so that a number used again is never hit.

    python -S flows/tether.py PID     ends PID once its standard input is closed
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import signal
import subprocess
import sys
from types import SimpleNamespace

SECONDS_TO_END = 5.0


@functools.cache  # once: tied twice, each server would have two to wait for it
def tie_temporary_server() -> None:
    """From now on every temporary server of this process is tied to it; with a real server there will be none."""
    from prefect.settings import PREFECT_API_URL

    if PREFECT_API_URL.value():
        return
    from prefect.server.api import server as module
    from prefect.server.api.server import SubprocessASGIServer

    # A session of its own: Ctrl-C, and whoever else stops a whole process group (Slurm, systemd), means the flow, which
    # then still has somebody to report to. Without its server it kept asking for minutes.
    popen = functools.partial(subprocess.Popen, start_new_session=True)
    module.subprocess = SimpleNamespace(**vars(subprocess) | {"Popen": popen})  # type: ignore[assignment, attr-defined]
    start = SubprocessASGIServer._run_uvicorn_command

    def start_tied(self: SubprocessASGIServer) -> subprocess.Popen[bytes]:
        server = start(self)
        command = [sys.executable, "-S", __file__, str(server.pid)]
        popen(command, stdin=subprocess.PIPE)
        return server

    SubprocessASGIServer._run_uvicorn_command = start_tied  # type: ignore[method-assign]


def wait_and_end(pid: int) -> None:
    """Wait for the end of our standard input, then end the process: SIGTERM, and SIGKILL after a while."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    while sys.stdin.buffer.read(1024):
        pass
    for number, seconds in ((signal.SIGTERM, SECONDS_TO_END), (signal.SIGKILL, SECONDS_TO_END)):
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, number)
        if select.select([process], [], [], seconds)[0]:  # readable once it has ended
            return


if __name__ == "__main__":
    wait_and_end(int(sys.argv[1]))
