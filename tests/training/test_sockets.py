"""Training on one node keeps to itself: whoever reaches a store of torch's can run code in its processes."""

from __future__ import annotations

import tempfile
import threading
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest

from tasks.launch import run_worker
from tasks.stage import is_done, read_order
from tests.training.conftest import make_stage


def sockets_of(processes: list[psutil.Process]) -> set[str]:
    """Where TCP sockets of these processes listen, as `address port`."""
    found = set()
    for process in processes:
        try:
            listening = [one for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
        except psutil.Error:  # it has just ended
            continue
        found |= {f"{one.laddr.ip} {one.laddr.port}" for one in listening}
    return found


def test_two_processes_listen_on_loopback_alone(
    tmp_path: Path, base: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)  # looked up again
    directory = make_stage(tmp_path / "runs", base, prepared, {"processes": 2})
    how = read_order(directory).how
    training = threading.Thread(target=run_worker, args=("tasks.training", [directory], how), kwargs={"forward": print})
    training.start()
    found: set[str] = set()
    ranks: dict[int, int] = {}  # process -> how often it was looked at
    while training.is_alive():
        processes = psutil.Process().children(recursive=True)
        found |= sockets_of(processes)
        for process in processes:
            if is_rank(command_of(process)):
                ranks[process.pid] = ranks.get(process.pid, 0) + 1
        training.join(0.02)
    assert is_done(directory)
    assert len(ranks) == 2 and min(ranks.values()) > 20, "the training was not seen"
    assert found, "gloo listens somewhere"
    beyond = sorted(one for one in found if not ip_address(one.split()[0]).is_loopback)
    assert not beyond, f"sockets beyond loopback: {beyond}"
    assert not list(temporary.iterdir()), "a folder of torchrun's, or of ours, is left"


def is_rank(command: str) -> bool:
    return "tasks.training" in command and "guard.py" not in command and "torch.distributed.run" not in command


def command_of(process: psutil.Process) -> str:
    """Its command line; empty when it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
