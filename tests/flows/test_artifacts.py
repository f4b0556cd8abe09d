"""What the UI shows beside the log is a courtesy: it comes back by itself, and is no noise while it cannot."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

from tasks import artifacts
from tasks.artifacts import _Poster
from tasks.progress import Reading


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What is warned of meanwhile."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("prefect.steep")
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def shown(key: str) -> list[Any]:
    with get_client(sync_client=True) as client:
        return client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])))


def test_progress_that_was_deleted_in_the_ui_is_shown_again(warnings: list[str]) -> None:
    poster = _Poster({})
    poster.latest["deleted"] = Reading("deleted", 0.25, "step 1/4")
    poster.post()
    [first] = shown("deleted-progress")
    with get_client(sync_client=True) as client:
        client.delete_artifact(first.id)
    for step in (2, 3):
        poster.latest["deleted"] = Reading("deleted", step / 4, f"step {step}/4")
        poster.post()
    [again] = shown("deleted-progress")
    assert (again.data, again.description, warnings) == (75.0, "step 3/4", [])


def test_a_server_that_is_away_is_told_once_and_asked_now_and_then(
    warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def away(**_: Any) -> Any:
        asked.append(now[0])
        raise ConnectionError("all connection attempts failed")

    poster, now = _Poster({}), [1000.0]
    monkeypatch.setattr(artifacts, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(artifacts, "get_client", away)

    def wait(seconds: float) -> bool:
        now[0] += seconds
        poster.latest["away"] = Reading("away", 0.5, f"at {now[0]}")
        if now[0] >= 3000:
            monkeypatch.setattr(artifacts, "get_client", get_client)  # it is back
        return now[0] >= 3070

    monkeypatch.setattr(poster.stopped, "wait", wait)
    poster.run()
    assert len(warnings) == 1 and "ConnectionError" in warnings[0], warnings
    assert 30 < len(asked) < 40
    [found] = shown("away-progress")
    assert found.description == "at 3070.0"
