"""What is posted to Prefect is posted before a run's process ends, and never holds it up for long."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from tasks import artifacts


@pytest.fixture
def posted(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A server that takes 0.3 s a post; when it was through with each."""
    times: list[float] = []

    def post(deed: Callable[[Any], Any], warning: str) -> None:
        time.sleep(0.3)
        times.append(time.monotonic())

    monkeypatch.setattr(artifacts, "_politely", post)
    monkeypatch.setattr(artifacts, "_run_ids", lambda: {"flow_run_id": "of a run"})
    return times


def test_flush_waits_for_what_is_queued(posted: list[float]) -> None:
    for _ in range(2):
        artifacts._post("tiny", list)
    assert not posted
    artifacts.flush()
    assert len(posted) == 2


def test_flush_drops_what_a_slow_server_has_not_begun(posted: list[float]) -> None:
    for _ in range(8):
        artifacts._post("tiny", list)
    started_at = time.monotonic()
    artifacts.flush(0.1)
    assert time.monotonic() - started_at < 1
    time.sleep(1)
    assert len(posted) == 1
    artifacts._post("tiny", list)  # the next run of this process posts again
    artifacts.flush()
    assert len(posted) == 2
