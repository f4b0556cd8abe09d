"""What the UI shows beside the log is a courtesy: it comes back by itself, and is no noise while it cannot."""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

from tasks import artifacts
from tasks.artifacts import _Poster, _report_text
from tasks.plan import Planned
from tasks.progress import Reading
from tasks.stage import Order


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
    poster = _Poster("Tiny_run.v2", {})
    poster.latest["deleted"] = Reading("deleted", 0.25, "step 1/4")
    poster.post()
    [first] = shown("tiny-run-v2-deleted-progress")
    with get_client(sync_client=True) as client:
        client.delete_artifact(first.id)
    for step in (2, 3):
        poster.latest["deleted"] = Reading("deleted", step / 4, f"step {step}/4")
        poster.post()
    [again] = shown("tiny-run-v2-deleted-progress")
    assert (again.data, again.description, warnings) == (75.0, "step 3/4", [])


def test_a_server_that_is_away_is_told_once_and_asked_now_and_then(
    warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def away(**_: Any) -> Any:
        asked.append(now[0])
        raise ConnectionError("all connection attempts failed")

    poster, now = _Poster("Tiny_run.v2", {}), [1000.0]
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
    [found] = shown("tiny-run-v2-away-progress")
    assert found.description == "at 3070.0"


@pytest.mark.parametrize("is_served", [False, True])
def test_the_report_leads_to_the_models_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_served: bool) -> None:
    for model in ("cpt-1", "sft-2"):
        (tmp_path / "runs" / model / "model").mkdir(parents=True)
    inputs = {stage: str(tmp_path / "runs" / name) for stage, name in
              (("prepare_cpt", "prepare_cpt-0"), ("cpt", "cpt-1"), ("sft", "sft-2"))}  # fmt: skip
    planned = Planned(Order("report", "report", "tiny", {}, {}, inputs), tmp_path / "runs" / "report-3", ())
    monkeypatch.setenv("STEEP_FILES_URL", "http://127.0.0.1:4201")
    monkeypatch.chdir(tmp_path if is_served else tmp_path / "runs")  # what is shown to browsers is ./runs
    text = _report_text(planned)
    assert "prepare" not in text
    for stage, name in (("cpt", "cpt-1"), ("sft", "sft-2")):
        there = tmp_path / "runs" / name / "model"
        link = f"[{there}](http://127.0.0.1:4201/{name}/model/)" if is_served else f"`{there}` on {platform.node()}"
        assert f"Model of {stage}: {link}\n" in text
