"""What `make deploy` registers, on a server of its own where it takes one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from prefect import Flow
from prefect.client.schemas.objects import FlowRun
from prefect.context import TagsContext
from prefect.flow_engine import FlowRunEngine
from prefect.server.events.schemas.automations import EventTrigger as ServerTrigger
from prefect.server.events.schemas.events import ReceivedEvent
from prefect.server.models.events import _as_resource_data, _resource_data_as_related_resources

import flows.pipeline
from flows import deploy
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
        trigger = deploy.silence({event.rpartition(".")[2]}, 120)
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
