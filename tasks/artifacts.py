"""What Prefect's UI shows of a stage beside its log: live progress, tables, the loss curve, links.

Posted to the server as artifacts of the task run. An artifact is a courtesy: when the server is away for a while, a
stage that has run for days goes on, one warning stands in the log, and progress is shown again once it is back. It is
posted from a thread of its own, so that following the worker's log never waits for the server; an update costs the
server 40 ms, so it comes every 2 s.

Nothing here reads a text of the data: what is shown are names and numbers of ours.
"""

from __future__ import annotations

import base64
import contextvars
import json
import math
import os
import platform
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.context import FlowRunContext, TaskRunContext
from prefect.exceptions import PrefectHTTPStatusError
from prefect.logging import get_logger

from tasks import tables
from tasks.forecast import rows_for_table
from tasks.outcome import speaker
from tasks.plan import Planned
from tasks.progress import Reading, Thinning, read
from tasks.reporting.gate import read_verdict, say_verdict
from tasks.sketch import line_svg
from tasks.stage import ARTIFACT
from tasks.training.metrics import METRICS

SECONDS_BETWEEN_POSTS = 2.0
SECONDS_FOR_LAST_POST = 5.0
SECONDS_TO_FIRST_PICTURE, SECONDS_BETWEEN_PICTURES = 20.0, 180.0  # of the loss
SECONDS_WITHOUT_SERVER = 60.0  # after a post that failed: it may be away for days
_QUEUE = ThreadPoolExecutor(max_workers=1)
_POSTS: list[Future[Any]] = []  # what was queued since the last `flush`
FILES_URL_VARIABLE = "STEEP_FILES_URL"  # where `make serve` shows runs/ to a browser


@contextmanager
def live(stages: Sequence[Planned]) -> Iterator[Callable[[str], None]]:
    """Where a worker's lines go: to the run's log, and those of progress to one bar a stage too.

    The log keeps fewer of progress as hours pass: one every 2 s would be 43,200 rows of the server's database a day. A
    terminal, where they draw one line over and over, gets all of them.
    """
    say, thinning = speaker(), Thinning()
    if not (ids := _run_ids()):
        yield say
        return
    poster = _Poster(stages, ids)
    thread = threading.Thread(target=contextvars.copy_context().run, args=(poster.run,), daemon=True)
    thread.start()

    def say_and_show(line: str) -> None:
        reading = read(line)
        kept = reading is None or thinning.keeps(reading)
        if kept or sys.stderr.isatty():
            say(line, kept=kept)
        if reading:
            poster.latest[stages[0].stage if len(stages) == 1 else reading.stage] = reading

    try:
        yield say_and_show
    finally:
        poster.stopped.set()
        thread.join(SECONDS_FOR_LAST_POST)
        _POSTS.append(_QUEUE.submit(contextvars.copy_context().run, poster.post_last_picture))


def show_plan(plan: dict[str, Planned]) -> None:
    """The plan, as the table of a flow run."""
    forecast = rows_for_table(plan)
    _post(
        next(iter(plan.values())).order.run,
        lambda: [
            _table("plan", tables.plan(plan), "What runs, what is reused, and why"),
            *([_table("trainings", forecast, "What the trainings will take: memory, time, disk")] if forecast else []),
        ],
    )


def show_text(run_name: str, key: str, text: str) -> None:
    """A few words in markdown, as links."""
    _post(run_name, lambda: [_markdown(key, text)])


def show(stages: Sequence[Planned], reused: bool) -> None:
    """What stages left behind, by their kind (a training's loss was shown while it ran); of reused ones only the
    report, which closes every run."""
    if not reused or stages[0].order.kind == "report":
        _post(stages[0].order.run, lambda: _left_behind(stages))


def flush(seconds: float = SECONDS_FOR_LAST_POST) -> None:
    """Wait for what is queued; what has not begun by then is dropped.

    Posting makes Prefect start threads, which it no longer can while the interpreter shuts down.
    """
    dropped = [post.cancel() for post in wait(_POSTS, seconds).not_done]
    if any(dropped):
        get_logger("steep").warning("%d artifacts of this run are not shown: the server was too slow", sum(dropped))
    _POSTS.clear()


def _left_behind(stages: Sequence[Planned]) -> list[dict[str, Any]]:
    kind, directory, name = stages[0].order.kind, stages[0].directory, stages[0].stage
    if kind == "prepare":
        ledger = _table(f"{name}-ledger", tables.ledger(directory), "Tokens by source, from read to trained")
        return [ledger, _table(f"{name}-mix", tables.mix(directory), "Shares asked for and achieved")]
    if kind == "train":
        return []
    if kind == "evaluate":
        rows = tables.evaluations([planned.directory for planned in stages])
        return [_table("evaluation", rows, "Metrics of the models evaluated in this run")]
    results = _table("results", tables.results_csv(directory), "Metrics of base, CPT and SFT")
    return [results, _markdown("report", _report_text(stages[0]))]


class _Poster:
    """Keeps one progress artifact a stage at the latest reading, and the loss of a training at its latest steps."""

    def __init__(self, stages: Sequence[Planned], ids: dict[str, Any]) -> None:
        self.run_name, self.ids, self.stopped = stages[0].order.run, ids, threading.Event()
        self.latest: dict[str, Reading] = {}
        self.shown: dict[str, Reading] = {}  # by stage
        self.made: dict[str, UUID] = {}  # artifacts by key
        self.training = stages[0] if stages[0].order.kind == "train" else None
        self.steps_before = self._steps_written_at()  # by an earlier try, or by the stage that is reused
        self.draw_at = math.inf
        self.told, self.try_again_at = False, 0.0

    def run(self) -> None:
        """Post until stopped, and once more then."""
        while not self.stopped.wait(SECONDS_BETWEEN_POSTS):
            if time.monotonic() >= self.try_again_at:
                self.post()
        self.post()

    def post(self) -> None:
        """Create or update what has changed; one warning, and no further try for a while, if the server does not."""
        changed = {stage: reading for stage, reading in dict(self.latest).items() if self.shown.get(stage) != reading}
        draws = self._is_picture_due()
        warning = "" if self.told else "progress is not shown until the server takes it"
        if (changed or draws) and not _politely(lambda client: self._post_all(client, changed, draws), warning):
            self.told, self.try_again_at = True, time.monotonic() + SECONDS_WITHOUT_SERVER

    def post_last_picture(self) -> None:
        """The loss once more, however the training ended: up to the step that broke it, too."""
        if self._has_trained():
            _politely(self._draw, "the loss of this run is not shown")

    def _post_all(self, client: SyncPrefectClient, changed: dict[str, Reading], draws: bool) -> None:
        for stage, reading in changed.items():
            content = {"data": 100.0 * reading.share, "description": reading.text}
            self._keep(client, {"key": f"{stage}-progress", "type": "progress", **content})
            self.shown[stage] = reading
        if draws:
            self._draw(client)

    def _draw(self, client: SyncPrefectClient) -> None:
        assert self.training is not None
        self._keep(client, _markdown(f"{self.training.stage}-loss", _training_text(self.training)))
        self.draw_at = time.monotonic() + SECONDS_BETWEEN_PICTURES

    def _keep(self, client: SyncPrefectClient, artifact: dict[str, Any]) -> None:
        key, content = artifact["key"], {name: artifact[name] for name in ("data", "description") if name in artifact}
        if key not in self.made or not _update(client, self.made[key], ArtifactUpdate(**content)):
            self.made[key] = _create(client, self.run_name, artifact, self.ids)

    def _is_picture_due(self) -> bool:
        if self.draw_at == math.inf and self._has_trained():
            self.draw_at = time.monotonic() + SECONDS_TO_FIRST_PICTURE
        return time.monotonic() >= self.draw_at

    def _has_trained(self) -> bool:
        return self._steps_written_at() not in (0, self.steps_before)

    def _steps_written_at(self) -> int:
        """When the last step was written down, in nanoseconds; 0 without any step."""
        try:
            metrics = (self.training.directory / METRICS).stat() if self.training else None
        except FileNotFoundError:
            return 0
        return metrics.st_mtime_ns if metrics and metrics.st_size else 0


def _run_ids() -> dict[str, Any]:
    """Whose artifacts these are; empty outside a run."""
    task, flow = TaskRunContext.get(), FlowRunContext.get()
    if task:
        return {"task_run_id": task.task_run.id, "flow_run_id": task.task_run.flow_run_id}
    return {"flow_run_id": flow.flow_run.id} if flow and flow.flow_run else {}


def _post(run_name: str, build: Callable[[], list[dict[str, Any]]]) -> None:
    """Queue them: the next stage does not wait for the server to take the tables of the one before."""
    if ids := _run_ids():
        context = contextvars.copy_context()
        warning = "an artifact of this run is not shown"
        create = partial(_create_all, run_name=run_name, build=build, ids=ids)
        _POSTS.append(_QUEUE.submit(context.run, _politely, create, warning))


def _create_all(
    client: SyncPrefectClient, run_name: str, build: Callable[[], list[dict[str, Any]]], ids: dict[str, Any]
) -> None:
    for artifact in build():
        _create(client, run_name, artifact, ids)


def _create(client: SyncPrefectClient, run_name: str, artifact: dict[str, Any], ids: dict[str, Any]) -> UUID:
    """Under a key with the name of the run's file: the UI shows artifacts of one key as one history."""
    key = re.sub("[^a-z0-9]+", "-", f"{run_name}-{artifact['key']}".lower())  # what Prefect takes
    return client.create_artifact(ArtifactCreate(**artifact | {"key": key}, **ids)).id


def _update(client: SyncPrefectClient, artifact: UUID, update: ArtifactUpdate) -> bool:
    """False when the artifact is gone: somebody deleted it in the UI."""
    try:
        client.update_artifact(artifact, update)
    except PrefectHTTPStatusError as error:
        if error.response.status_code == HTTPStatus.NOT_FOUND:
            return False
        raise
    return True


def _politely(deed: Callable[[SyncPrefectClient], Any], warning: str) -> bool:
    """Do it if the server takes it, and say whether it did; a stage does not fail for what only decorates it."""
    try:
        with get_client(sync_client=True) as client:
            deed(client)
    except Exception as error:
        if warning:
            get_logger("steep").warning("%s: %r", warning, error)
        return False
    return True


def _table(key: str, rows: list[dict[str, Any]], title: str) -> dict[str, Any]:
    return {"key": key, "type": "table", "data": json.dumps(rows), "description": title}


def _markdown(key: str, text: str) -> dict[str, Any]:
    return {"key": key, "type": "markdown", "data": text}


def _training_text(planned: Planned) -> str:
    directory = planned.directory
    steps, losses = tables.loss_curve(directory)
    picture = base64.b64encode(line_svg(steps, losses, "loss").encode()).decode()
    ended = (directory / ARTIFACT).is_file()
    rows = tables.training_facts(directory) if ended else tables.training_so_far(directory)
    facts = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        f"## {planned.stage}: loss over steps\n\n![loss over steps](data:image/svg+xml;base64,{picture})\n\n"
        f"| what | value |\n|---|---|\n{facts}\n\n"
        + (f"Model: {_link(directory / 'model')}\n\n" if ended else "")
        + f"Log: {_link(directory / 'worker.log')}\n"
    )


def _report_text(planned: Planned) -> str:
    directory = planned.directory
    verdict = read_verdict(directory)
    lines = [say_verdict(verdict)] if verdict else []
    lines += [f"Report: {_link(directory / 'report.html')}", f"Figures: {_link(directory / 'results.csv')}"]
    for stage, made in planned.order.inputs.items():
        if (model := Path(made) / "model").is_dir():
            lines.append(f"Model of {stage}: {_link(model)}")
    return "\n\n".join(lines) + "\n"


def _link(path: Path) -> str:
    """A link that a browser opens, where somebody shows runs/ to it; else where to look for it."""
    base, runs = os.environ.get(FILES_URL_VARIABLE), Path("runs").resolve()
    if base and path.resolve().is_relative_to(runs):
        relative = path.resolve().relative_to(runs).as_posix() + ("/" if path.is_dir() else "")
        return f"[{path}]({base}/{relative})"
    return f"`{path.resolve()}` on {platform.node()}"
