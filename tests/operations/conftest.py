"""`make serve` as a user runs it, in a project of its own: real server, real worker, real PostgreSQL where there is one."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import tests.conftest as shared
from tests.conftest import ROOT

SECONDS_TO_START = 240.0
SECONDS_FOR_A_RUN = 300.0  # a minute on two quiet cores
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


@dataclass(frozen=True)
class Served:
    """A running `make serve`: its project, its addresses, its process and what it said."""

    project: Path
    url: str
    process: subprocess.Popen[bytes]
    output: Path

    def api(self, path: str, body: Any = None, method: str = "") -> Any:
        """One call of Prefect's API; as Prefect's client does, asked again while a locked SQLite answers 503."""
        import httpx

        verb = method or ("POST" if body is not None else "GET")
        for _ in range(10):
            answer = httpx.request(verb, f"{self.url}/api{path}", json=body, timeout=30)
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                break
            time.sleep(0.5)
        assert answer.is_success, f"{path}: {answer.status_code} {answer.text}"
        return answer.json() if answer.content else None

    def answers(self) -> bool:
        """Whether the server is there."""
        import httpx

        with contextlib.suppress(httpx.TransportError):
            return bool(httpx.get(f"{self.url}/api/health", timeout=5).is_success)
        return False

    def start_run(self, deployment: str = "pipeline/cpu", **parameters: Any) -> str:
        """Start a run of a deployment; its id."""
        found = self.api(f"/deployments/name/{deployment}")
        return str(self.api(f"/deployments/{found['id']}/create_flow_run", {"parameters": parameters})["id"])

    def wait_for_run(self, run_id: str) -> dict[str, Any]:
        """The run once it has ended."""
        wait_for(lambda: self.api(f"/flow_runs/{run_id}")["state_type"] in FINAL, SECONDS_FOR_A_RUN)
        return dict(self.api(f"/flow_runs/{run_id}"))

    def task_states(self, run_id: str) -> dict[str, str]:
        """Name and state of its task runs, once the server has caught up: it learns of them through events."""

        def settled() -> list[dict[str, Any]]:
            found = self.api("/task_runs/filter", {"flow_runs": {"id": {"any_": [run_id]}}})
            return found if found and all(task["state_type"] in FINAL for task in found) else []

        before: list[dict[str, Any]] = []
        while len(found := wait_for(settled, 30)) != len(before):
            before = found
            time.sleep(2)
        return {task["name"]: task["state_name"] for task in found}

    def logs(self, run_id: str) -> list[dict[str, Any]]:
        """Its log lines, oldest first."""
        wanted = {"logs": {"flow_run_id": {"any_": [run_id]}}, "sort": "TIMESTAMP_ASC", "limit": 200}
        return list(self.api("/logs/filter", wanted))

    def artifacts(self, run_id: str) -> dict[str, dict[str, Any]]:
        """Its artifacts by key, without the name of the run's file, with which all of them begin."""
        found = self.api("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run_id]}}})
        assert all(artifact["key"].startswith("tiny-") for artifact in found), found
        return {artifact["key"].removeprefix("tiny-"): artifact for artifact in found}


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s in vain"
        time.sleep(0.5)
    return found


def make_project(base: Path) -> Path:
    """A project of its own: our code by links, a small config with its data, under paths that a browser may type."""
    project = Path(tempfile.mkdtemp(prefix="steep-operations-"))
    project.chmod(0o755)
    for name in ("flows", "tasks", "tests", "prefect.yaml"):
        (project / name).symlink_to(ROOT / name)
    (project / "configs").mkdir()
    shutil.copy(ROOT / "configs/hardware.yaml", project / "configs")
    here = Path.cwd()
    os.chdir(project)
    try:
        shared.project.__wrapped__(Path(), base)
    finally:
        os.chdir(here)
    (project / "run.yaml").rename(project / "configs/regulator.yaml")
    return project


def serve(project: Path, output: Path, *arguments: str) -> tuple[subprocess.Popen[bytes], str]:
    """Start `python -m flows.serve` and wait until it says that it serves; the process and its address."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "STEEP_"))}
    paths = [str(project), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    port = free_port()
    command = [sys.executable, "-m", "flows.serve", "--port", str(port), *arguments]
    with output.open("ab") as sink:
        process = subprocess.Popen(command, cwd=project, env=environment, stdout=sink, stderr=subprocess.STDOUT)

    def started() -> bool:
        assert process.poll() is None, output.read_text()
        return "Ctrl-C ends all of it" in output.read_text()

    wait_for(started, SECONDS_TO_START)
    return process, f"http://127.0.0.1:{port}"


def free_port() -> int:
    """A port that is free together with the next one."""
    for _ in range(100):
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port
    raise AssertionError("no two free ports in a row")


def forget(project: Path, output: Path) -> None:
    """Remove a project, and its database where that lies elsewhere."""
    for found in re.findall(r"PostgreSQL in (\S+/steep-[0-9a-f]{10})$", output.read_text(), re.MULTILINE):
        shutil.rmtree(found, ignore_errors=True)
    shutil.rmtree(project, ignore_errors=True)


@pytest.fixture(scope="session")
def served(tiny_base: Path) -> Iterator[Served]:
    """`make serve`, once for all tests that need one."""
    project = make_project(tiny_base)
    output = project / "serve.out"
    process, url = serve(project, output)
    try:
        yield Served(project, url, process, output)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(90)
        forget(project, output)


@pytest.fixture(scope="session")
def first_run(served: Served) -> str:
    """The id of a run that has computed everything."""
    run_id = served.start_run()
    run = served.wait_for_run(run_id)
    assert run["state_name"] == "Completed", run["state"]["message"]
    return run_id
