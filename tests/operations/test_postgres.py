"""PostgreSQL under a guard that is killed, and the lock of a server whose machine went down."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flows import postgres, serve
from flows.postgres import as_user, find_binaries, forget_dead_server, prepare_cluster
from flows.services import Service
from tasks.errors import UserError
from tests.conftest import ROOT
from tests.tasks.test_launch import alive, wait_for


def test_a_killed_guard_takes_postgresql_along_though_a_client_is_connected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (binaries := find_binaries()) is None:
        pytest.skip("PostgreSQL is not installed here: Debian's package is postgresql")
    monkeypatch.chdir(ROOT)  # the guard is a module of ours
    cluster = prepare_cluster(tmp_path, binaries)
    service = Service("PostgreSQL", cluster.command(), tmp_path / "log")
    asked = ["psql", "-h", str(cluster.socket), "-U", "steep", "-d", "postgres", "-qc", "select pg_sleep(120)"]
    try:
        service.start()
        service.wait_until(cluster.ready, 60)
        pid = int((cluster.data / "postmaster.pid").read_text().split("\n", 1)[0])
        client = subprocess.Popen(as_user(cluster.user, [str(binaries / asked[0]), *asked[1:]]), stderr=subprocess.PIPE)
        with pytest.raises(subprocess.TimeoutExpired):
            client.wait(1)  # it is connected, or it would have ended
        assert service.process is not None
        service.process.send_signal(signal.SIGKILL)
        wait_for(lambda: not alive(pid), 10)
        client.communicate(timeout=10)
        service.process.wait()
        service.start()  # its lock is gone: the next one starts
        service.wait_until(cluster.ready, 60)
    finally:
        service.stop()
        shutil.rmtree(cluster.data)


def test_a_database_whose_programs_are_gone_is_not_replaced_by_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(serve.DATABASE, raising=False)
    monkeypatch.setattr(postgres, "find_binaries", lambda: None)
    assert serve._start_database(None, tmp_path, []).startswith("SQLite")
    (tmp_path / "postgres").mkdir()
    (tmp_path / "postgres/PG_VERSION").write_text("15\n")
    with pytest.raises(UserError, match="PostgreSQL 15, which is not installed any more"):
        serve._start_database(None, tmp_path, [])
    assert serve._start_database("sqlite", tmp_path, []).startswith("SQLite")


def install(folder: Path, version: str) -> None:
    """Programs that say they are of that version."""
    folder.mkdir(parents=True)
    (folder / "initdb").write_text('#!/bin/sh\necho "it is not to be called" >&2; exit 1\n')
    (folder / "postgres").write_text(
        f"#!/bin/sh\necho 'postgres (PostgreSQL) {version} (Debian {version}-1.pgdg12+1)'\n"
    )
    for name in ("initdb", "postgres"):
        (folder / name).chmod(0o755)


@pytest.mark.parametrize("on_path", ["17.2", "15.14", None])
def test_what_stands_is_run_by_the_version_that_made_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_path: str | None
) -> None:
    monkeypatch.setattr(postgres, "DEBIAN", tmp_path / "debian")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)  # the data lies in the project's folder then
    monkeypatch.setattr(shutil, "which", lambda _name: str(tmp_path / "path/initdb") if on_path else None)
    for version in ("15.14", "16rc1", "17.2"):
        install(tmp_path / f"debian/{version[:2]}/bin", version)
    if on_path:
        install(tmp_path / "path", on_path)
    newest = find_binaries()
    assert newest == (tmp_path / "path" if on_path else tmp_path / "debian/17/bin")
    (tmp_path / "postgres").mkdir()
    for made_by in ("15", "16", "17"):
        (tmp_path / "postgres/PG_VERSION").write_text(f"{made_by}\n")
        is_on_path = on_path is not None and on_path.startswith(made_by)
        expected = tmp_path / ("path" if is_on_path else f"debian/{made_by}/bin")
        assert prepare_cluster(tmp_path, newest).binaries == expected

    (tmp_path / "postgres/PG_VERSION").write_text("16\n")
    shutil.rmtree(tmp_path / "debian/16")
    with pytest.raises(UserError, match=r"of PostgreSQL 16, and installed here is (17 and 15|15 and 17)\n") as caught:
        prepare_cluster(tmp_path, newest)
    assert "pg_upgrade" in str(caught.value) and f"where: {tmp_path}/postgres" in str(caught.value)


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


@pytest.mark.parametrize("serves", ["by its arguments", "by its working directory", "another folder"])
def test_only_a_living_server_of_the_folder_keeps_its_lock(tmp_path: Path, serves: str) -> None:
    """After a restart the number may be that of the system's PostgreSQL."""
    (data := tmp_path / "data").mkdir()
    (tmp_path / "other").mkdir()
    (postgres := tmp_path / "postgres").symlink_to(sys.executable)
    names = data if serves == "by its arguments" else tmp_path / "other"
    folder = data if serves == "by its working directory" else tmp_path / "other"
    command = [str(postgres), "-S", "-c", "import sys; print(flush=True); sys.stdin.read()", "-D", str(names)]
    with subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as alive:
        assert alive.stdout is not None and alive.stdout.readline() == b"\n"  # its arguments can be read now
        (data / "postmaster.pid").write_text(f"{alive.pid}\n{data}\n")
        forget_dead_server(data)
        assert (data / "postmaster.pid").exists() == (serves != "another folder")


def test_the_lock_of_a_real_server_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if (binaries := find_binaries()) is None:
        pytest.skip("PostgreSQL is not installed here: Debian's package is postgresql")
    monkeypatch.chdir(ROOT)
    cluster = prepare_cluster(tmp_path, binaries)
    service = Service("PostgreSQL", cluster.command(), tmp_path / "log")
    try:
        service.start()
        service.wait_until(cluster.ready, 60)
        forget_dead_server(cluster.data)
        assert (cluster.data / "postmaster.pid").exists()
    finally:
        service.stop()
        shutil.rmtree(cluster.data)
