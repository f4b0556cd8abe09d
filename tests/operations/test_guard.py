"""What stands in a session of its own (torchrun's ranks, a Prefect worker's flow runs) does not escape the guard."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.tasks.test_launch import alive, wait_for

WORKER = """
import os, subprocess, sys, time
from pathlib import Path
script = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
Path(sys.argv[1]).write_text(f"{os.getpid()} {child.pid}\\n")
time.sleep(600)
"""


@pytest.mark.parametrize("hit", ["guard", "worker"])
def test_a_grandchild_in_its_own_session_ends_too(tmp_path: Path, hit: str) -> None:
    pids_file = tmp_path / "pids"
    command = [sys.executable, "-m", "tasks.guard", "--grace", "1", "--", sys.executable, "-c", WORKER, str(pids_file)]
    with subprocess.Popen(command, cwd=ROOT) as guard:
        wait_for(lambda: pids_file.exists() and pids_file.read_text().endswith("\n"))
        worker, grandchild = map(int, pids_file.read_text().split())
        assert alive(worker) and alive(grandchild)
        if hit == "guard":
            guard.send_signal(signal.SIGTERM)
        else:
            subprocess.run(["kill", "-KILL", str(worker)], check=True)
        guard.wait(30)
        assert not alive(worker) and not alive(grandchild)
