"""Of runs by schedule that are alike one computes; on the server of the flows' tests, through Prefect's own engine."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.flow_engine import run_flow
from prefect.states import Cancelling, Completed, Pending, Running

import flows.pipeline
from flows.overlap import BY_SCHEDULE, first_alike
from tests.conftest import ROOT

MINE = {"config": str(ROOT / "configs/regulator.yaml"), "hardware": "cpu"}


@pytest.fixture(autouse=True)
def reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flow ends where it would begin to compute."""
    monkeypatch.setattr(flows.pipeline, "hand_over", lambda *_: Completed(name="Reached"))


@pytest.fixture
def client() -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as made:
        yield made


@pytest.fixture
def deployment(client: SyncPrefectClient, request: pytest.FixtureRequest) -> Any:
    return client.create_deployment(client.create_flow(flows.pipeline.pipeline), request.node.name)


def late(client: SyncPrefectClient, deployment: Any, *, by_schedule: bool = True, **other: Any) -> FlowRun:
    """A run that waits to be started."""
    tags = [BY_SCHEDULE] if by_schedule else []
    return client.create_flow_run_from_deployment(deployment, parameters=MINE | other, tags=tags)


def end_of(client: SyncPrefectClient, run: FlowRun) -> str:
    """Run it as a worker does; the state that it ends in."""
    client.set_flow_run_state(run.id, Pending())
    run_flow(
        flows.pipeline.pipeline, flow_run=client.read_flow_run(run.id), parameters=run.parameters, return_type="state"
    )
    ended = client.read_flow_run(run.id)
    assert ended.state is not None and ended.state.is_completed()
    return str(ended.state.name)


@pytest.mark.parametrize("state", [Running, Cancelling])
def test_of_late_runs_by_schedule_one_computes(client: SyncPrefectClient, deployment: Any, state: Any) -> None:
    first, second, third, fourth = (late(client, deployment) for _ in range(4))
    client.set_flow_run_state(first.id, Running(), force=True)
    client.set_flow_run_state(first.id, state(), force=True)
    assert [end_of(client, run) for run in (second, third)] == ["Skipped", "Skipped"]
    said = client.read_flow_run(second.id).state
    assert said is not None and str(first.id) in str(said.message) and "already running" in str(said.message)
    client.set_flow_run_state(first.id, Completed(), force=True)
    assert end_of(client, fourth) == "Reached"


def test_a_run_by_hand_waits_as_ever_and_a_run_of_something_else_is_not_alike(
    client: SyncPrefectClient, deployment: Any
) -> None:
    first = late(client, deployment)
    client.set_flow_run_state(first.id, Running(), force=True)
    assert end_of(client, late(client, deployment, by_schedule=False)) == "Reached"
    assert end_of(client, late(client, deployment, only="report")) == "Reached"
    other = client.create_deployment(client.create_flow(flows.pipeline.pipeline), "another")
    assert end_of(client, late(client, other)) == "Reached"
    assert end_of(client, late(client, deployment)) == "Skipped"


def test_a_run_by_schedule_gives_way_to_one_by_hand_that_runs(client: SyncPrefectClient, deployment: Any) -> None:
    """Not to one that only waits for a slot."""
    waiting, by_hand = late(client, deployment), late(client, deployment, by_schedule=False)
    client.set_flow_run_state(waiting.id, Pending())
    assert end_of(client, late(client, deployment)) == "Reached"
    client.set_flow_run_state(by_hand.id, Running(), force=True)
    assert end_of(client, waiting) == "Skipped"


def test_of_runs_that_begin_at_once_all_name_the_same_one() -> None:
    began = [datetime(2026, 1, 1, 2, 0, second, tzinfo=UTC) for second in (1, 0, 0)]
    runs = [FlowRun(flow_id=uuid4(), start_time=moment, parameters=MINE) for moment in began]
    assert len({first_alike(run, runs).id for run in runs}) == 1
    assert first_alike(runs[0], runs).start_time == began[1]
