"""A secret in the environment reaches the workers and nothing that is kept; the file view shows runs/ and nothing else."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from prefect.blocks.system import Secret
from prefect.settings import PREFECT_UI_API_URL, temporary_settings
from starlette.responses import PlainTextResponse

import flows.server
from flows.credentials import load_secrets
from flows.files import Handler, names_on_loopback
from tasks.errors import UserError
from tests.conftest import ROOT, edit, set_activation
from tests.local_hub import Hub
from tests.operations.conftest import Served

CANARY = "hf_canary_0123456789abcdefghij"
HEX_KEY = "0123456789abcdef" * 2


@pytest.fixture
def view(tmp_path: Path) -> Iterator[str]:
    runs = tmp_path / "runs"
    (runs / "report-1").mkdir(parents=True)
    (runs / "report-1/report.html").write_text("<h1>report</h1><script>alert(1)</script>")
    (runs / ".locks").mkdir()
    (runs / ".locks/a.lock").write_text("hidden")
    (tmp_path / "secret.txt").write_text(CANARY)
    (runs / "way-out").symlink_to(tmp_path / "secret.txt")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(runs)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def test_a_report_is_shown_and_its_scripts_are_dead(view: str) -> None:
    with urllib.request.urlopen(f"{view}/report-1/report.html") as answer:
        assert answer.status == 200
        policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "sandbox" in policy and "script-src" not in policy


@pytest.mark.parametrize("path", ["/way-out", "/.locks/a.lock", "/../secret.txt", "/%2e%2e/secret.txt", "//etc/passwd"])
def test_nothing_outside_is_shown(view: str, path: str) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(view + path)


def ask(url: str, method: str = "GET", **headers: str) -> int:
    """The answer's status."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers, method=method)) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as refused:
        if refused.code == 401:
            assert refused.headers["WWW-Authenticate"].startswith("Basic ")  # or no browser asks its user
        return refused.code


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "0.0.0.0", ""])
def test_a_page_whose_name_was_pointed_at_us_reads_nothing(view: str, host: str) -> None:
    path = f"{view}/report-1/report.html"
    assert ask(path, Host=host) == 421
    assert ask(path, Host="localhost") == ask(path, Host="LOCALHOST:8001") == 200


def test_the_view_answers_to_the_name_that_we_were_told(tmp_path: Path) -> None:
    names = names_on_loopback("https://files.example.org/steep")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path), names=names))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        assert ask(url, Host="files.example.org") == ask(url) == 200
        assert ask(url, Host="evil.example") == ask(url, Host="") == 421
    finally:
        server.shutdown()


@pytest.mark.parametrize("told", ["https://Prefect.example.org/api", "http://127.0.0.1:4200/api"])
def test_the_server_answers_to_the_name_that_its_ui_was_told(monkeypatch: pytest.MonkeyPatch, told: str) -> None:
    applications: list[Any] = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **_: applications.append(app))  # what uvicorn would serve
    monkeypatch.setattr(sys, "argv", ["flows.server", "start"])
    monkeypatch.setattr(flows.server, "prefect", lambda: uvicorn.run(PlainTextResponse("an answer")))
    with temporary_settings({PREFECT_UI_API_URL: told}):
        flows.server.main()
    hosts = ("127.0.0.1:4200", "localhost", "prefect.example.org", "evil.example", "example.org", "")

    async def status(host: str) -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(applications[0])) as client:
            return (await client.get("http://proxied/", headers={"Host": host})).status_code

    answered = [host for host in hosts if asyncio.run(status(host)) == 200]
    assert answered == list(hosts[:3] if "example" in told else hosts[:2])


def test_reports_want_the_credentials_of_the_server(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("numbers")
    handler = partial(Handler, directory=str(tmp_path), credentials="user:pass word")
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        for path in ("/", "/report.html", "/gone.html"):
            assert ask(url + path) == ask(url + path, method="HEAD") == 401
        for wrong in ("user:pass", "user:pass word ", ":", "üser:pass word"):
            assert ask(f"{url}/report.html", Authorization=basic(wrong)) == 401
        assert ask(f"{url}/report.html", Authorization="Bearer user:pass word") == 401
        assert ask(f"{url}/report.html", Authorization=basic("user:pass word")) == 200
    finally:
        server.shutdown()


def basic(credentials: str) -> str:
    return "Basic " + base64.b64encode(credentials.encode()).decode()


@pytest.mark.operations
def test_the_server_lets_no_foreign_page_read_what_it_holds(served: Served) -> None:
    port = served.url.rpartition(":")[2]
    allowed = {}
    for origin in (f"http://127.0.0.1:{port}", f"http://localhost:{port}", "https://evil.example", "null"):
        asked = urllib.request.Request(f"{served.url}/api/admin/version", headers={"Origin": origin})
        with urllib.request.urlopen(asked) as answer:
            allowed[origin] = answer.headers["Access-Control-Allow-Origin"]
    assert allowed == {origin: origin if port in origin else None for origin in allowed}


@pytest.mark.operations
def test_a_page_whose_name_was_pointed_at_the_server_cannot_use_it(served: Served) -> None:
    port = served.url.rpartition(":")[2]
    for path in ("/", "/api/health", "/api/admin/version", "/api/deployments/name/pipeline/cpu"):
        for host in ("evil.example", f"evil.example:{port}", f"127.0.0.1.evil.example:{port}", ""):
            assert ask(served.url + path, Host=host) == 400, (path, host)
        assert ask(served.url + path, Host=f"localhost:{port}") == ask(served.url + path) == 200, path
    assert "101 Switching Protocols" in shake_hands(int(port), f"127.0.0.1:{port}")
    assert "400 Bad Request" in shake_hands(int(port), f"evil.example:{port}")


def shake_hands(port: int, host: str) -> str:
    """The first line that answers who asks for a websocket, as events and logs come in."""
    lines = ["GET /api/events/in HTTP/1.1", f"Host: {host}", "Connection: Upgrade", "Upgrade: websocket",
             "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "", ""]  # fmt: skip
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall("\r\n".join(lines).encode())
        return connection.recv(4096).decode().splitlines()[0]


@pytest.mark.operations
@pytest.mark.parametrize("ends", ["well", "badly"])
def test_a_secret_is_in_nothing_that_is_kept(project: Path, ends: str) -> None:
    if ends == "badly":  # an activation that transformers does not know: the trainer dies with a traceback
        set_activation(project / "base/config.json", "of_tomorrow")
    home = project / "prefect"
    environment = os.environ | {"HF_TOKEN": CANARY, "WANDB_API_KEY": CANARY, "PREFECT_HOME": str(home)}
    environment.pop("PREFECT_API_URL", None)
    command = [sys.executable, "-m", "flows.pipeline", "--config", str(project / "run.yaml")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=400, check=False)
    assert done.returncode == (0 if ends == "well" else 1), done.stderr.decode()
    if ends == "badly":
        [log] = (project / "runs").glob("cpt-*/worker.log")
        assert "Traceback (most recent call last)" in log.read_text() and b"KeyError" in done.stderr
    kept = [path for folder in (project / "runs", home) for path in folder.rglob("*") if path.is_file()]
    assert len(kept) > 15 and any(path.name == "prefect.db" for path in kept)  # logs and artifacts stand there
    assert [str(path) for path in kept if CANARY.encode() in path.read_bytes()] == []
    assert CANARY.encode() not in done.stdout + done.stderr


@pytest.mark.operations
@pytest.mark.parametrize("refuses", [False, True])
def test_a_token_that_the_hub_gets_is_in_nothing_that_is_kept(project: Path, hub: Hub, refuses: bool) -> None:
    """Flow and worker ask with the token; a hub that refuses it behind the plan ends the worker's reading."""
    edit(project, f'files: "{project}/laws*.jsonl"', "hf: {id: nobody/data, split: test}")
    hub.failures = [200, 200, *[403] * 100] if refuses else []  # planned by the command line and in the flow
    home = project / "prefect"
    environment = os.environ | {"HF_TOKEN": CANARY, "HF_ENDPOINT": hub.url, "HF_HOME": str(project / "cache")}
    environment |= {"PREFECT_HOME": str(home), "HF_HUB_VERBOSITY": "debug"}
    environment.pop("PREFECT_API_URL", None)
    command = [sys.executable, "-m", "flows.pipeline", "--config", str(project / "run.yaml"), "--only", "prepare"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=400, check=False)
    assert done.returncode == (2 if refuses else 0), (done.stdout + done.stderr).decode()
    assert hub.tokens == {f"Bearer {CANARY}"} and len(hub.asked_at) > 1
    assert (b"403" in done.stderr) == refuses
    kept = [path for folder in (project / "runs", project / "cache", home) for path in folder.rglob("*")]
    kept = [path for path in kept if path.is_file()]
    assert {"order.json", "worker.log", "prefect.db"} <= {path.name for path in kept}
    assert [str(path) for path in kept if CANARY.encode() in path.read_bytes()] == []
    assert CANARY.encode() not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        (CANARY, "entry 1 of STEEP_SECRET_BLOCKS"),
        (f"HF_TOKEN=hub,{CANARY}=", "entry 2 of STEEP_SECRET_BLOCKS"),
        (f"HF TOKEN={CANARY}", "entry 1 of STEEP_SECRET_BLOCKS"),
        (f"STEEP_TEST_TOKEN={CANARY}", "entry 1 of STEEP_SECRET_BLOCKS"),
        (f"STEEP_TEST_TOKEN={HEX_KEY}", "a Secret block for STEEP_TEST_TOKEN"),  # as a block may be called
    ],
)
def test_a_secret_in_the_place_of_its_blocks_name_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, blocks: str, said: str
) -> None:
    def missing(_name: str) -> None:
        raise ValueError("no such block")

    monkeypatch.setenv("STEEP_SECRET_BLOCKS", blocks)
    monkeypatch.setenv("HF_TOKEN", "set already")
    monkeypatch.setattr(Secret, "load", missing)
    with pytest.raises(UserError, match=said) as caught:
        load_secrets()
    assert CANARY not in str(caught.value) and HEX_KEY not in str(caught.value)


SAVE = "import sys; from prefect.blocks.system import Secret; Secret(value=sys.argv[1]).save('hub-canary')"
LOADED = "import os; from flows.credentials import load_secrets; load_secrets(); print(os.environ['HF_TOKEN'])"


@pytest.mark.operations
def test_a_secret_block_of_a_server_reaches_the_run_and_nothing_that_is_kept(served: Served) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "PREFECT_HOME")}
    environment |= {"PREFECT_API_URL": f"{served.url}/api", "PREFECT_HOME": str(served.project / ".prefect")}
    environment |= {"PYTHONPATH": str(served.project), "STEEP_SECRET_BLOCKS": "HF_TOKEN=hub-canary"}

    def python(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, cwd=served.project, env=environment | more, capture_output=True, text=True, check=False
        )

    missing = python("-c", LOADED)
    assert (
        missing.returncode != 0 and "names a Secret block for HF_TOKEN which the server does not hold" in missing.stderr
    )
    assert python("-c", SAVE, CANARY).returncode == 0
    assert python("-c", LOADED).stdout.strip() == CANARY  # it does arrive

    text = (served.project / "configs/regulator.yaml").read_text()
    (served.project / "configs/secret.yaml").write_text(text.replace("seed: 0", "seed: 8"))
    done = python("-m", "flows.pipeline", "--config", "configs/secret.yaml", "--only", "prepare")
    assert done.returncode == 0, done.stderr
    [run] = [r for r in served.api("/flow_runs/filter", {}) if r["parameters"].get("config") == "configs/secret.yaml"]
    told = [run, served.wait_for_run(run["id"]), served.logs(run["id"]), served.artifacts(run["id"])]
    assert len(told[2]) > 3 and len(told[3]) > 2
    assert CANARY not in json.dumps(told) + done.stdout + done.stderr
    kept = [
        path for folder in ("runs", ".prefect/logs") for path in (served.project / folder).rglob("*") if path.is_file()
    ]
    assert len(kept) > 10
    assert [str(path) for path in kept if CANARY.encode() in path.read_bytes()] == []
