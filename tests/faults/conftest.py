"""The world that is hurt, made once a session; the seed of every random moment; the table of what was tried."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import tests.conftest as shared
from tests.conftest import CONFIG, laws, write_lines
from tests.faults.table import Table
from tests.faults.world import World

# A failure prints it; STEEP_FAULT_SEED=... replays every moment of that session.
SEED = int(os.environ.get("STEEP_FAULT_SEED") or time.time_ns() % 1_000_000)
LONGER = {
    "tokens: 4096": "tokens: 8192",  # 128 steps of one row, the first 26 of them warm-up
    "replay: {{general: 0.25}}\n  learning_rate: 1.0e-3\n  batch_tokens: 512": (
        "replay: {{general: 0.25}}\n  learning_rate: 1.0e-3\n  warmup_ratio: 0.2\n  batch_tokens: 64\n"
        "  checkpoint: {{every_steps: 10, every_minutes: null}}"
    ),
}


def pytest_report_header(config: pytest.Config) -> str:
    """The seed, before anything runs."""
    return f"STEEP_FAULT_SEED={SEED}"


@pytest.fixture
def moment(request: pytest.FixtureRequest) -> Iterator[random.Random]:
    """The random numbers of one case: they follow from the seed and its name, so it replays alone."""
    print(f"STEEP_FAULT_SEED={SEED}")  # shown when the case fails
    yield random.Random(f"{SEED} {request.node.name}")


@pytest.fixture(scope="session")
def table() -> Table:
    """What was tried, survived and lost; written after every case where STEEP_FAULT_TABLE says."""
    return Table(SEED)


def make_world(folder: Path, tiny_base: Path) -> World:
    """A project with a config whose stages last long enough to be hit."""
    folder.mkdir(parents=True, exist_ok=True)
    shared.project.__wrapped__(folder, tiny_base)
    write_lines(folder / "laws.jsonl", laws(6000))
    write_lines(folder / "general.jsonl", [{"text": f"The river of town {n} is {n * 3} miles."} for n in range(900)])
    text = CONFIG
    for before, after in LONGER.items():
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    (folder / "run.yaml").write_text(text.format(folder=folder))
    return World(folder)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[World]:
    """A project whose undisturbed stages stand beside it."""
    made = make_world(tmp_path_factory.mktemp("faults"), tiny_base)
    yield made
    made.end_all()


@pytest.fixture(autouse=True)
def nothing_runs(request: pytest.FixtureRequest) -> Iterator[None]:
    """No case inherits a process from the one before."""
    yield
    if "world" in request.fixturenames:
        request.getfixturevalue("world").end_all()
    if "table" in request.fixturenames and (path := os.environ.get("STEEP_FAULT_TABLE")):
        request.getfixturevalue("table").write(Path(path))
