"""What `make deploy` registers, on a server of its own where it takes one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
import yaml
from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, DeploymentUpdate
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule
from prefect.context import TagsContext
from prefect.flow_engine import FlowRunEngine
from prefect.server.events.schemas.automations import EventTrigger as ServerTrigger
from prefect.server.events.schemas.events import ReceivedEvent
from prefect.server.models.events import _as_resource_data, _resource_data_as_related_resources
from prefect.settings import PREFECT_API_URL

import flows.pipeline
from flows import automations, deploy, standing
from flows.pools import TAG
from tests.conftest import ROOT

HEARTBEAT, CANCELLING = "prefect.flow-run.heartbeat", "prefect.flow-run.Cancelling"


def heard(run: FlowRun) -> dict[str, ReceivedEvent]:
    """Two events of a run: the one that its process sends, and the one that the server makes of a state."""
    resource, related = FlowRunEngine(
        flow=Flow(lambda: None, name="pipeline"), flow_run=run
    )._build_heartbeat_event_template()
    deployment = SimpleNamespace(id=run.deployment_id, name="cpu", tags=[]) if run.deployment_id else None
    flow: Any = SimpleNamespace(id=run.flow_id, name="pipeline", tags=[])
    of_state = _resource_data_as_related_resources(_as_resource_data(run, flow, deployment, None, None), ["flow-run"])  # type: ignore[arg-type]
    said = {HEARTBEAT: [dict(one) for one in related], CANCELLING: of_state}
    return {
        event: ReceivedEvent(
            occurred="2026-01-01T00:00:00Z", id=uuid4(), event=event, resource=resource, related=others
        )
        for event, others in said.items()
    }


@pytest.mark.parametrize("deployed", [True, False])
@pytest.mark.parametrize("tags", [[TAG], ["nightly", TAG], ["theirs"], []])
def test_runs_of_others_on_the_server_are_left_alone(tags: list[str], deployed: bool) -> None:
    """Also of a flow that is called as ours: they may send no heartbeat for minutes."""
    run = FlowRun(flow_id=uuid4(), deployment_id=uuid4() if deployed else None, tags=tags)
    events = heard(run)
    for event in (HEARTBEAT, CANCELLING):
        trigger = automations.silence({event.rpartition(".")[2]}, 120)
        server = ServerTrigger.model_validate(trigger.model_dump(mode="json"))
        assert server.starts_after(event) and server.covers(events[event]) == (TAG in tags), event


def test_every_deployment_and_every_run_by_hand_has_our_tag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert all(TAG in entry["tags"] for entry in deploy.read_file()["deployments"])
    seen: list[set[str]] = []
    monkeypatch.setattr(flows.pipeline, "tie_temporary_server", lambda: None)
    monkeypatch.setattr(flows.pipeline, "pipeline", lambda *_: seen.append(TagsContext.get().current_tags))
    assert flows.pipeline.main([]) == 0
    assert seen == [{TAG}]


def test_a_deployment_that_would_send_no_heartbeat_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(deploy, "PREFECT_FILE", tmp_path / "prefect.yaml")
    entry = "{name: mine, entrypoint: 'flows.pipeline:pipeline', work_pool: {name: cpu}}"
    (tmp_path / "prefect.yaml").write_text(f"deployments: [{entry}]")
    with pytest.raises(deploy.UserError, match=r"mine of flows\.pipeline:pipeline sets no PREFECT_FLOWS_HEARTBEAT"):
        deploy.read_file()


@pytest.fixture(scope="module")
def client() -> Iterator[SyncPrefectClient]:
    """A server of its own, without workers."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=180), get_client(sync_client=True) as made:
        yield made


@pytest.fixture
def file(client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A prefect.yaml of two deployments, of which one has schedules."""
    said = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    cpu = next(entry for entry in said["deployments"] if entry["name"] == "cpu")
    cpu["schedules"] = [
        {"slug": "nightly", "cron": "0 2 * * *", "timezone": "UTC"},
        {"slug": "weekly", "interval": 604800},
    ]
    old = cpu | {"name": "old", "schedules": [{"slug": "hourly", "cron": "0 * * * *"}]}
    path = tmp_path / "prefect.yaml"
    write(path, said | {"deployments": [cpu, old]})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.setenv("PREFECT_API_URL", str(PREFECT_API_URL.value()))
    return path


def write(path: Path, said: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(said))


def active(deployment: DeploymentResponse) -> dict[str | None, bool]:
    return {schedule.slug: schedule.active for schedule in deployment.schedules}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_was_changed_on_the_server_stays_and_what_the_file_says_anew_wins(
    client: SyncPrefectClient, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def deploy_and_read() -> tuple[str, DeploymentResponse, DeploymentResponse]:
        capsys.readouterr()
        deploy.deploy("here")
        said = capsys.readouterr().out
        return said, *[client.read_deployment_by_name(f"pipeline/{name}") for name in ("cpu", "old")]

    said, cpu, old = deploy_and_read()
    assert said.startswith("deployed to here") and active(cpu) == {"nightly": True, "weekly": True}
    assert TAG in cpu.tags and cpu.parameters["hardware"] == "cpu" and not cpu.paused

    # an operator at work
    nightly = next(schedule for schedule in cpu.schedules if schedule.slug == "nightly")
    client.update_deployment_schedule(cpu.id, nightly.id, active=False)
    client.create_deployment_schedules(cpu.id, [DeploymentScheduleCreate(schedule=CronSchedule(cron="5 5 * * *"))])
    client.update_deployment(cpu.id, DeploymentUpdate(parameters=cpu.parameters | {"hardware": "auto"}))
    client.pause_deployment(old.id)
    for _ in range(2):  # what is kept once is kept for ever
        said, cpu, old = deploy_and_read()
        assert active(cpu) == {"nightly": False, "weekly": True, None: True}
        assert cpu.parameters["hardware"] == "auto" and not cpu.paused and old.paused
        assert [line.partition(" on the server")[0] for line in said.splitlines()[:-1]] == [
            'kept: pipeline/cpu: parameter hardware: "auto"',
            "kept: pipeline/cpu: active nightly: false",
            "kept: pipeline/old: paused: true",
        ]

    # others on the same server: of our name elsewhere, of another name here, and from before names were written down
    elsewhere = [{"prefect.deployments.steps.set_working_directory": {"directory": "/elsewhere"}}]
    for name, starts_in in (("clone", elsewhere), ("image", old.pull_steps), ("older", old.pull_steps)):
        client.create_deployment(old.flow_id, name, pull_steps=starts_in, tags=[TAG])
    standing.keep_last("pipeline/clone", {}, "steep")
    standing.keep_last("pipeline/image", {}, "theirs")

    # the file changes: a slug, a time, a parameter, a deployment gone
    entries = yaml.safe_load(file.read_text())
    entries["deployments"].pop()
    changed = entries["deployments"][0]
    changed["schedules"] = [{"slug": "evening", "cron": "0 20 * * *"}, {"slug": "weekly", "interval": 86400}]
    changed["parameters"] = {"config": "configs/mine.yaml", "hardware": "cpu"}
    client.resume_deployment(old.id)
    before = file.read_text()
    write(file, entries)
    said, cpu, old = deploy_and_read()
    assert active(cpu) == {"evening": True, "weekly": True, None: True}
    weekly = next(schedule for schedule in cpu.schedules if schedule.slug == "weekly")
    assert weekly.schedule.interval.days == 1  # type: ignore[union-attr]
    assert cpu.parameters == {"config": "configs/mine.yaml", "hardware": "auto"}
    assert old.paused and "paused: pipeline/old: it is no longer in prefect.yaml" in said
    for name in ("clone", "image", "older"):
        assert not client.read_deployment_by_name(f"pipeline/{name}").paused, name
    assert "set: pipeline/cpu: schedule nightly" in said and 'kept: pipeline/cpu: parameter hardware: "auto"' in said

    # without schedules at all, and the old deployment back
    entries = yaml.safe_load(before)
    del entries["deployments"][0]["schedules"]
    write(file, entries)
    said, cpu, old = deploy_and_read()
    assert active(cpu) == {None: True} and active(old) == {"hourly": True} and not old.paused


@pytest.mark.parametrize(
    ("schedule", "said"),
    [({"cron": "0 2 * * *"}, "has no slug"), ({"slug": "a", "cron": "often"}, "'a' of pipeline/cpu is none")],
)
def test_a_schedule_that_is_none_is_one_message(
    monkeypatch: pytest.MonkeyPatch, schedule: dict[str, Any], said: str
) -> None:
    with pytest.raises(deploy.UserError, match=said):
        standing.fields_of_file("pipeline/cpu", {"schedules": [schedule]})
