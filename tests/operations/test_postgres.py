"""The lock of a PostgreSQL server whose machine went down."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.postgres import forget_dead_server


@pytest.mark.parametrize("holder", ["another process", "a zombie", "nobody"])
def test_a_dead_servers_lock_is_forgotten(tmp_path: Path, holder: str) -> None:
    dead = subprocess.Popen([sys.executable, "-c", "pass"], stdout=subprocess.PIPE)
    assert dead.stdout is not None and dead.stdout.read() == b""  # it has ended, and nobody has reaped it
    if holder == "nobody":
        dead.wait()
    pid = os.getpid() if holder == "another process" else dead.pid
    (tmp_path / "postmaster.pid").write_text(f"{pid}\n/data\n")
    forget_dead_server(tmp_path)
    assert (tmp_path / "postmaster.pid").exists() == (holder == "nobody")  # that one PostgreSQL removes itself
    dead.wait()


def test_a_living_servers_lock_stays(tmp_path: Path) -> None:
    postgres = tmp_path / "postgres"
    postgres.symlink_to(sys.executable)
    with subprocess.Popen([str(postgres), "-S", "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as alive:
        (tmp_path / "postmaster.pid").write_text(f"{alive.pid}\n/data\n")
        forget_dead_server(tmp_path)
        assert (tmp_path / "postmaster.pid").exists()
