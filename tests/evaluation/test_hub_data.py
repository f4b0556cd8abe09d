"""Tasks with data of the hub, read by lm-eval and `datasets` themselves from a hub on loopback (tests/local_hub.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.evaluation.conftest import TASKS
from tests.local_hub import LAWS, Hub

LOAD = """
import sys
from pathlib import Path
from tasks.errors import UserError
from tasks.evaluation.suite import load_suite
try:
    print(len(load_suite(["bpb"], Path(sys.argv[1]))[1]["bpb"][0].eval_docs), "documents")
except UserError as error:
    print(error, file=sys.stderr)  # the traceback goes to the log
    sys.exit(2)
"""
LOCAL = "dataset_path: json\ndataset_kwargs: {data_files: {test: FOLDER/documents.jsonl}}\n"


def load(hub: Hub, folder: Path, dataset: str = "nobody/data", **more: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: the libraries read where the hub is, and whether to ask it, when they are imported."""
    assert LOCAL in TASKS["bpb"]
    (folder / "bpb.yaml").write_text(TASKS["bpb"].replace(LOCAL, f"dataset_path: {dataset}\n"))
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home")} | more
    command = [sys.executable, "-c", LOAD, str(folder)]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=200)


def test_data_comes_from_a_hub_that_hangs_up_and_fails_on_the_way(hub: Hub, tmp_path: Path) -> None:
    hub.failures = [0, 200, 503, 200, 200, 0]  # at the card, at the commit, and further on
    done = load(hub, tmp_path)
    assert not hub.failures
    assert done.returncode == 0 and f"{len(LAWS)} documents" in done.stdout, done.stdout + done.stderr


def test_a_hub_that_keeps_hanging_up_is_not_called_offline(hub: Hub, tmp_path: Path) -> None:
    hub.failures = [0] * 100
    done = load(hub, tmp_path)
    assert done.returncode == 2 and "offline" not in done.stderr, done.stdout + done.stderr
    assert "the data of the evaluation task 'bpb' did not come: " in done.stderr
    assert "(asked 5 times)" in done.stderr and "run the same command again" in done.stderr
    assert len(hub.asked_at) == 5


def test_what_the_hub_refuses_is_asked_once_and_told(hub: Hub, tmp_path: Path) -> None:
    hub.failures = [403] * 100
    done = load(hub, tmp_path)
    assert done.returncode == 2 and "offline" not in done.stderr and "times)" not in done.stderr
    assert "the evaluation task 'bpb' does not load" in done.stderr and "403" in done.stderr, done.stderr
    assert len(hub.asked_at) == 1


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"])
def test_offline_is_said_of_a_run_that_is(hub: Hub, tmp_path: Path, variable: str) -> None:
    done = load(hub, tmp_path, **{variable: "1"})
    assert done.returncode == 2 and "needs data of the hub, and this run is offline" in done.stderr, done.stderr
    assert not hub.asked_at
