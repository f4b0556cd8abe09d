"""A hub that fails now and then, as a real HTTP server on loopback; the hub's own client is asked in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.conftest import ROOT

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ASK = """
import sys
from pathlib import Path
from tasks import hub
from tasks.errors import UserError
try:
    commit = hub.resolve_commit("nobody/model", None, "model", "run.yaml:5")
    print(commit)
    if "fetch" in sys.argv:
        print((hub.fetch_model(commit and "nobody/model", commit) / "model.safetensors").read_bytes())
except UserError as error:
    print(error)
    sys.exit(2)
"""


class Hub(ThreadingHTTPServer):
    """Answers as the hub does; `failures` says what it does before, one each a request: a status, or 0 for hanging up."""

    daemon_threads = True

    def __init__(self, failures: list[int]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.failures, self.asked_at = failures, []  # type: ignore[var-annotated]


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if "/nobody/model" not in self.path:  # what else the hub's client asks for: which agent it runs under
            self.send_error(404)
            return
        self.server.asked_at.append(time.monotonic())
        if self.server.failures:
            status = self.server.failures.pop(0)
            if not status:
                self.close_connection = True
                self.connection.close()
                return
            self.send_error(status)
            return
        files = {"config.json": b"{}", "model.safetensors": b"weights"}
        body = files.get(self.path.rsplit("/", 1)[-1])
        if "/tree/" in self.path:
            body = json.dumps([{"type": "file", "path": name, "oid": "0" * 40, "size": len(content)}
                               for name, content in files.items()]).encode()  # fmt: skip
        elif body is None:
            siblings = [{"rfilename": name} for name in files]
            body = json.dumps({"id": "nobody/model", "sha": COMMIT, "siblings": siblings}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{len(body)}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub([])
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()


def ask(hub: Hub, home: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}", "HF_HOME": str(home)} | more
    command = [sys.executable, "-c", ASK, *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)


def test_a_hub_that_fails_three_times_is_asked_a_fourth_with_longer_waits(hub: Hub, tmp_path: Path) -> None:
    hub.failures = [503, 0, 429]
    done = ask(hub, tmp_path)
    assert done.returncode == 0 and done.stdout.strip() == COMMIT, done.stdout + done.stderr
    waits = [after - before for before, after in zip(hub.asked_at, hub.asked_at[1:], strict=False)]
    assert len(waits) == 3 and waits[0] >= 0.5 and waits[1] >= 1.0 and waits[2] >= 2.0, waits


def test_a_hub_that_keeps_failing_ends_with_a_message(hub: Hub, tmp_path: Path) -> None:
    hub.failures = [503] * 100
    done = ask(hub, tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "nobody/model at main" in done.stdout and "503" in done.stdout and "run.yaml:5" in done.stdout
    assert len(hub.asked_at) == 5


@pytest.mark.parametrize("case", ["no such model", "offline"])
def test_what_waiting_cannot_mend_is_asked_once(hub: Hub, tmp_path: Path, case: str) -> None:
    hub.failures = [404] * 10
    began = time.monotonic()
    done = ask(hub, tmp_path, **({"HF_HUB_OFFLINE": "1"} if case == "offline" else {}))
    assert done.returncode == 2 and "nobody/model" in done.stdout
    assert len(hub.asked_at) == (1 if case == "no such model" else 0)
    assert time.monotonic() - began < 60


def test_a_model_comes_through_a_flaky_hub_whole(hub: Hub, tmp_path: Path) -> None:
    hub.failures = [503, 503]
    done = ask(hub, tmp_path, "fetch")
    assert done.returncode == 0 and "b'weights'" in done.stdout, done.stdout + done.stderr
