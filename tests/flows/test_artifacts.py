"""What the UI shows beside the log is a courtesy: it comes back by itself, and is no noise while it cannot."""

from __future__ import annotations

import base64
import json
import logging
import math
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

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


def stage_of(directory: Path, kind: str) -> Planned:
    return Planned(Order("cpt", kind, "Tiny_run.v2", {}, {}, {}), directory, ())


def shown(key: str) -> list[Any]:
    with get_client(sync_client=True) as client:
        return client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])))


def test_progress_that_was_deleted_in_the_ui_is_shown_again(warnings: list[str], tmp_path: Path) -> None:
    poster = _Poster([stage_of(tmp_path, "evaluate")], {})
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
    warnings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def away(**_: Any) -> Any:
        asked.append(now[0])
        raise ConnectionError("all connection attempts failed")

    poster, now = _Poster([stage_of(tmp_path, "evaluate")], {}), [1000.0]
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


def step(number: int) -> str:
    return json.dumps({"step": number, "loss": 1 / number, "tokens": 1000, "seconds": 0.5}) + "\n"


def num_points(text: str) -> int:
    picture = base64.b64decode(text.split("base64,")[1].split(")")[0]).decode()
    return len(picture.split('points="')[1].split('"')[0].split())


def test_the_loss_is_shown_while_a_training_runs_and_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, metrics = "tiny-run-v2-cpt-loss", tmp_path / "metrics.jsonl"
    monkeypatch.setattr(artifacts, "_run_ids", lambda: {"flow_run_id": uuid4()})
    for name, seconds in (
        ("SECONDS_BETWEEN_POSTS", 0.05),
        ("SECONDS_TO_FIRST_PICTURE", 0.1),
        ("SECONDS_BETWEEN_PICTURES", 0.3),
    ):
        monkeypatch.setattr(artifacts, name, seconds)
    metrics.write_text(step(1))
    with artifacts.live([stage_of(tmp_path, "train")]):
        time.sleep(1)
    artifacts._QUEUE.submit(int).result()
    assert shown(key) == [], "it was reused: another run has shown it"

    with pytest.raises(FloatingPointError), artifacts.live([stage_of(tmp_path, "train")]):
        metrics.write_text(step(1) + step(2) + step(3)[:20])  # looked at in the middle of a line
        wait_until(lambda: [num_points(one.data) for one in shown(key)] == [2 + 1])  # the last one twice, as its end
        metrics.write_text("".join(step(number) for number in range(1, 9)))
        wait_until(lambda: [num_points(one.data) for one in shown(key)] == [8 + 1])
        monkeypatch.setattr(artifacts, "SECONDS_BETWEEN_PICTURES", math.inf)
        time.sleep(1)
        metrics.write_text("".join(step(number) for number in range(1, 10)))
        raise FloatingPointError("a loss that is not finite")
    artifacts._QUEUE.submit(int).result()
    [text] = [one.data for one in shown(key)]
    assert num_points(text) == 9 + 1 and "| steps so far | 9 |" in text and "| tokens a second | 2,000 |" in text


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
