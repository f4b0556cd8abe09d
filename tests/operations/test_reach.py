"""A server that does not answer, is none or does not know us: one message that names PREFECT_API_URL, and no traceback."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from flows import deploy
from tests.conftest import ROOT
from tests.operations.conftest import free_port


class Stranger(BaseHTTPRequestHandler):
    """Answers /CODE/... with that code and a page."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(int(self.path.split("/")[1]))
        self.send_header("Content-Length", "13")
        self.end_headers()
        self.wfile.write(b"<html></html>")

    do_GET = do_POST  # Prefect asks for a token first

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture(scope="module")
def stranger() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stranger)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def end_of(module: str, url: str, home: Path) -> list[str]:
    """What a program says of that server: one screen, and exit code 2."""
    command = [sys.executable, "-m", module, *(["--only", "report"] if module == "flows.pipeline" else [])]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment |= {"PREFECT_API_URL": url, "PREFECT_HOME": str(home)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 2 and "Traceback" not in said, said
    assert f"{url}" in said and "PREFECT_API_URL" in said, said
    return said.strip().splitlines()


SAID = {"401": "PREFECT_API_KEY", "403": "PREFECT_API_AUTH_STRING", "404": "404 Not Found", "405": "with /api",
        "200": "something else than a Prefect server"}  # fmt: skip


@pytest.mark.parametrize("code", SAID)
def test_deploying_to_what_is_no_server_of_ours_is_one_message(stranger: str, tmp_path: Path, code: str) -> None:
    said = end_of("flows.deploy", f"{stranger}/{code}", tmp_path)
    assert SAID[code] in "\n".join(said) and len(said) <= 4


def test_a_profile_of_the_users_is_not_read_and_the_messages_say_so(stranger: str, tmp_path: Path) -> None:
    (tmp_path / ".prefect").mkdir()
    profile = f"PREFECT_API_URL = '{stranger}/200'\nPREFECT_API_AUTH_STRING = 'user:password'\n"
    (tmp_path / ".prefect/profiles.toml").write_text(f"active = 'theirs'\n[profiles.theirs]\n{profile}")
    (project := tmp_path / "project").mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}

    def python(*arguments: str, **more: str) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=project, env=environment | more, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    asked = "from prefect.settings import PREFECT_API_URL; print(PREFECT_API_URL.value())"
    assert python("-c", asked).strip() == f"{stranger}/200"  # as Prefect itself reads it
    assert python("-c", f"import flows; {asked}").strip() == "None"
    for told in ({}, {"PREFECT_API_URL": f"{stranger}/401"}):
        assert "profiles of Prefect in ~/.prefect are not read" in python("-m", "flows.deploy", **told)


@pytest.mark.parametrize("module", ["flows.deploy", "flows.pipeline"])
def test_a_server_that_is_away_is_one_message(tmp_path: Path, module: str) -> None:
    said = end_of(module, f"http://127.0.0.1:{free_port()}/api", tmp_path)
    assert "no server answers" in said[0] and "Connection refused" in said[0] and len(said) <= 4


WRONG = {
    "hardware: cpux": "the parameters of pipeline/mine: .*'cpux' is not one of",
    "config: ../a.yaml": "the parameters of pipeline/mine: .*a YAML file below the project",
    "hardwear: cpu": "pipeline/mine has no parameter 'hardwear'",
}


@pytest.mark.parametrize("parameters", WRONG)
def test_a_wrong_parameter_in_the_file_is_told_before_anything_is_deployed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, parameters: str
) -> None:
    monkeypatch.setattr(deploy, "PREFECT_FILE", tmp_path / "prefect.yaml")
    pool = f"{{name: cpu, job_variables: {{env: {{{deploy.HEARTBEAT}: '30'}}}}}}"
    entry = f"{{name: mine, entrypoint: 'flows.pipeline:pipeline', work_pool: {pool}, parameters: {{{parameters}}}}}"
    (tmp_path / "prefect.yaml").write_text(f"deployments: [{entry}]")
    with pytest.raises(deploy.UserError) as caught:
        deploy.read_file()
    assert re.search(WRONG[parameters], str(caught.value))


def test_of_a_traceback_of_prefect_the_end_is_shown() -> None:
    frames = [
        '  File "a.py", line 1, in a',
        "    raise_it()",
        "    ^^^^^^^^^^",
        '  File "b.py", line 2, in b',
        "    raise it",
    ]
    output = "\n".join(["Traceback (most recent call last):", *frames, "prefect.exceptions.X: 409, 'cpux' is none"])
    assert deploy.end_of(output) == "prefect.exceptions.X: 409, 'cpux' is none"
    assert deploy.end_of("Invalid fields:\n\n  - cpu: schedule\n") == "Invalid fields:\n\n  - cpu: schedule"
