"""What runs on every node but the first: `python -m tasks.agent [HOST:PORT]`, from the same checkout and `runs/`.

It waits for the node that runs the pipeline (at HOST:PORT, or STEEP_RENDEZVOUS), takes its share of each training
stage, and waits for the next one, until it is stopped. SIGTERM lets all nodes save a checkpoint first.

Exit codes: 143 stopped; 1 the other node was lost in the middle of a stage (the share here has been ended).
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from tasks.errors import EXIT_USER_ERROR, UserError
from tasks.gpus import booked
from tasks.guard import has_ended
from tasks.launch import POLL_SECONDS, python_command, start_guarded, worker_environment
from tasks.nodes import SECONDS_TO_FOLLOW, Link, read_endpoint
from tasks.stage import ORDER, read_order

CONNECT_SECONDS = 1.0
SECONDS_FOR_ORDER = 60.0  # a shared filesystem may show a new file late
_stopped: list[int] = []


def main(argv: list[str]) -> int:
    """Take part in one stage after the other."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, _frame: _stopped.append(received))
    host, port = read_endpoint(argv[0] if argv else None)
    print(f"waiting for stages at {host}:{port}", flush=True)
    while not _stopped:
        link = connect(host, port)
        task = wait_for_task(link) if link else None
        if link and task:
            take_part(link, task)
            if link.lost:
                print(f"{link.lost}; this node's share has been ended", flush=True)
                return 1
    return 143


def connect(host: str, port: int) -> Link | None:
    """A link to node 0, or None while it does not listen."""
    try:
        connection = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
    except OSError:
        time.sleep(CONNECT_SECONDS)
        return None
    link = Link(connection, f"node 0 ({host})")
    link.tell(agent=socket.gethostname())
    return link


def wait_for_task(link: Link) -> dict[str, Any] | None:
    """What node 0 asks for; None when it went away first (its stage was refused, or it was stopped)."""
    while not _stopped and not link.lost:
        if tasks := [message for message in link.poll() if "directory" in message]:
            return tasks[0]
        time.sleep(POLL_SECONDS)
    link.connection.close()
    return None


def take_part(link: Link, task: dict[str, Any]) -> None:
    """Run this node's share under a guard, until it ends, the other side ends or is lost, or we are stopped."""
    directory, rank = Path(task["directory"]), int(task["node_rank"])
    meanwhile = partial(stay_wanted, link)
    try:
        wait_for(directory / ORDER, meanwhile)
        order = read_order(directory)
        how = order.how | {"master": task["master"], "node_rank": rank}
        print(f"{order.stage}: node {rank} of {how['nodes']} in {directory}", flush=True)
        command = [*python_command("tasks.training", how), str(directory)]
        with (
            booked("tasks.training", how, str(directory), partial(print, flush=True), meanwhile) as gpus,
            (directory / f"worker-node{rank}.log").open("ab") as log,
        ):
            share = start_guarded(command, log, worker_environment(how, (), task["hub"]), gpus)
            stay_until_end(link, share)
    except NotWanted:
        link.connection.close()
        return
    except UserError as error:  # no shared runs/, or fewer GPUs here than the tag says: node 0 shows it
        link.tell(exit=EXIT_USER_ERROR, tail=error.render().splitlines())
        raise
    print(f"{order.stage}: this node's share exited with {share.returncode}", flush=True)
    link.tell(exit=share.returncode, tail=last_lines(Path(log.name)))
    while not (link.lost or link.over or _stopped):  # node 0 exports long after our ranks have ended
        link.poll()
        time.sleep(POLL_SECONDS)
    link.connection.close()


class NotWanted(Exception):
    """The stage ended, or we were stopped, before our share began."""


def stay_wanted(link: Link) -> None:
    """Before our share begins: keep the link alive, and go when nobody waits for us."""
    link.poll()
    if link.lost or link.over or _stopped:
        raise NotWanted


def stay_until_end(link: Link, share: subprocess.Popen[bytes]) -> None:
    """Until the share has ended; it is told to when the stage is over elsewhere, node 0 is lost or we are stopped."""
    over_at, told = 0.0, False
    while not has_ended(share, POLL_SECONDS):
        link.poll()
        over_at = over_at or (time.monotonic() if link.over else 0.0)
        late = over_at and time.monotonic() - over_at > SECONDS_TO_FOLLOW
        if (late or link.lost or _stopped) and not told:
            share.send_signal(signal.SIGTERM)
            told = True


def last_lines(log: Path, count: int = 15) -> list[str]:
    """The end of a log."""
    return log.read_text(errors="replace").splitlines()[-count:]


def wait_for(path: Path, meanwhile: Callable[[], None]) -> None:
    """Until a file of the shared filesystem shows here."""
    deadline = time.monotonic() + SECONDS_FOR_ORDER
    while not path.is_file():
        if time.monotonic() > deadline:
            raise UserError(f"{path} does not show on this node", allowed="a runs/ that all nodes share",
                            todo="set runs_dir to a folder of a shared filesystem")  # fmt: skip
        with suppress(OSError):
            list(path.parent.iterdir())  # NFS looks again
        meanwhile()
        time.sleep(1.0)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(error.render())
