"""The hub's own client, in a process of its own, against a hub that fails now and then (tests/local_hub.py)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.local_hub import COMMIT, Hub

CANARY = "hf_canary_0123456789abcdefghij"
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


def ask(hub: Hub, home: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home)} | more
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
    assert len(hub.asked_at) == 5 and "(asked 5 times)" in done.stdout


@pytest.mark.parametrize("case", ["no such model", "offline"])
def test_what_waiting_cannot_mend_is_asked_once(hub: Hub, tmp_path: Path, case: str) -> None:
    hub.failures = [404] * 10
    began = time.monotonic()
    done = ask(hub, tmp_path, **({"HF_HUB_OFFLINE": "1"} if case == "offline" else {}))
    assert done.returncode == 2 and "nobody/model" in done.stdout
    assert len(hub.asked_at) == (1 if case == "no such model" else 0) and "times)" not in done.stdout
    assert time.monotonic() - began < 60


def test_a_model_comes_through_a_flaky_hub_whole(hub: Hub, tmp_path: Path) -> None:
    hub.failures = [503, 503]
    done = ask(hub, tmp_path, "fetch")
    assert done.returncode == 0 and "b'weights'" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("failures", [[], [503, 0, 429], [401] * 10, [0] * 10, [200, *[403] * 10]])
def test_a_token_is_sent_to_the_hub_and_told_to_nobody_else(hub: Hub, tmp_path: Path, failures: list[int]) -> None:
    """In the words of the client's own log too, at its most talkative."""
    hub.failures = list(failures)
    done = ask(hub, tmp_path, "fetch", HF_TOKEN=CANARY, HF_HUB_VERBOSITY="debug")
    assert hub.tokens == {f"Bearer {CANARY}"}
    assert done.returncode == (0 if len(failures) < 10 else 2), done.stdout + done.stderr
    assert CANARY not in done.stdout + done.stderr
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [str(path) for path in kept if CANARY.encode() in path.read_bytes()] == []
