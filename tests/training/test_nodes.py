"""Two nodes on one machine: two agents, each with its own torchrun, over loopback. One of them is killed, then the
other; each time the survivor ends too, and the next run resumes. 85 CPU seconds, nine starts of torch."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tasks.errors import UserError
from tasks.nodes import RENDEZVOUS_VARIABLE, read_endpoint
from tasks.stage import is_done, read_artifact
from tests.training.conftest import (
    SEQ_LEN,
    largest_difference,
    make_documents,
    make_prepared,
    make_stage,
    num_lines,
    pack,
    train_here,
    wait_until,
)

SECONDS_TO_NOTICE = 60
HOST = """
import sys
from pathlib import Path
from tasks.launch import run_worker
from tasks.stage import read_order
directory = Path(sys.argv[1])
run_worker("tasks.training", [directory], read_order(directory).how, forward=print)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as sink:
        return subprocess.Popen([sys.executable, *arguments], stdout=sink, stderr=sink, env=environment)


def processes_of(directory: Path) -> list[str]:
    """Command lines of whatever still works on a stage."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(directory) in line:
            found.append(line)
    return found


def tree_of(pid: int) -> list[int]:
    """A process and everything below it."""
    below = (Path("/proc") / str(pid) / "task" / str(pid) / "children").read_text().split()
    return [pid, *(one for child in below for one in tree_of(int(child)))]


def wait_until_gone(directory: Path, deadline: float) -> None:
    while left := processes_of(directory):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_two_nodes_give_the_result_of_one_and_survive_the_loss_of_either(tmp_path: Path, base: Path) -> None:
    rows = make_prepared(tmp_path / "prepare_cpt-long", pack(make_documents(400))[:120])
    endpoint = f"127.0.0.1:{free_port()}"
    how = {"nodes": 2, "rendezvous": endpoint, "checkpoint": {"every_steps": 5, "every_minutes": None, "keep_last": 2}}
    directory = make_stage(tmp_path / "two", base, rows, how, batch_tokens=3 * SEQ_LEN)

    for killed, enough in (("agent", 8), ("host", 18)):
        agent = start(tmp_path / "agent.log", "-m", "tasks.agent", endpoint)
        host = start(tmp_path / "host.log", "-c", HOST, str(directory))
        wait_until(lambda enough=enough: num_lines(directory) >= enough, host)
        victim, survivor = (agent, host) if killed == "agent" else (host, agent)
        killed_at = time.monotonic()
        # The agent alone: its guard lets everybody save. Then all of a node at once, as when its machine is gone.
        for pid in [victim.pid] if killed == "agent" else tree_of(victim.pid):
            os.kill(pid, signal.SIGKILL)
        victim.wait()
        assert survivor.wait(SECONDS_TO_NOTICE) == 1
        assert "is gone" in (tmp_path / ("host.log" if killed == "agent" else "agent.log")).read_text()
        wait_until_gone(directory, killed_at + SECONDS_TO_NOTICE)
        assert not is_done(directory)

    agent = start(tmp_path / "agent.log", "-m", "tasks.agent", endpoint)
    host = start(tmp_path / "host.log", "-c", HOST, str(directory))
    assert host.wait(240) == 0, (tmp_path / "host.log").read_text()
    assert agent.poll() is None, "an agent waits for the next stage"
    agent.send_signal(signal.SIGTERM)
    assert agent.wait(30) == 143
    assert "node 1 of 2" in (tmp_path / "agent.log").read_text() and (directory / "worker-node1.log").stat().st_size

    counts = read_artifact(directory)["counts"]
    assert counts["wrapper"] == "FSDP2" and len(counts["resumed_from"]) == 2 and min(counts["resumed_from"]) >= 5
    single = make_stage(tmp_path / "one", base, rows, batch_tokens=3 * SEQ_LEN)
    train_here(single)
    assert largest_difference(directory, single) < 1e-4


def test_the_rendezvous_comes_from_the_tag_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RENDEZVOUS_VARIABLE, "elsewhere:29400")
    assert read_endpoint("here:1") == ("here", 1)
    assert read_endpoint(None) == ("elsewhere", 29400)
    monkeypatch.delenv(RENDEZVOUS_VARIABLE)
    with pytest.raises(UserError, match="several nodes need a rendezvous"):
        read_endpoint(None)
