"""Where a run of a deployment goes on, on the server of the flows' tests, through Prefect's own engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, FlowRunFilter, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun
from prefect.flow_engine import run_flow
from prefect.states import Pending

import flows.pipeline
from flows.routing import HANDED_OVER, gpu_tags
from tasks.artifacts import _QUEUE
from tests.conftest import ROOT

CONFIG = {"config": str(ROOT / "configs/regulator.yaml")}  # its own tag is cpu


@pytest.fixture(scope="module")
def client() -> Iterator[SyncPrefectClient]:
    """A deployment pipeline/POOL a pool."""
    with get_client(sync_client=True) as made:
        flow = made.create_flow(flows.pipeline.pipeline)
        for pool in ("cpu", "gpu-single", "gpu-multi"):
            made.create_work_pool(WorkPoolCreate(name=pool, type="process"))
            made.create_deployment(flow, pool, work_pool_name=pool)
        yield made


def run_in(client: SyncPrefectClient, pool: str, tags: list[str], **parameters: Any) -> FlowRun:
    """Run pipeline/POOL as its worker does; the run once it has ended."""
    deployment = client.read_deployment_by_name(f"pipeline/{pool}")
    run = client.create_flow_run_from_deployment(deployment.id, parameters=CONFIG | parameters, tags=tags)
    client.set_flow_run_state(run.id, Pending())
    run = client.read_flow_run(run.id)
    run_flow(flows.pipeline.pipeline, flow_run=run, parameters=run.parameters, return_type="state")
    return client.read_flow_run(run.id)


def test_a_run_that_was_handed_over_can_be_found(client: SyncPrefectClient) -> None:
    run = run_in(client, "cpu", ["ticket-7"], hardware="1xh200")
    [there] = client.read_flow_runs(flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=[HANDED_OVER])))
    assert "ticket-7" in there.tags and there.work_pool_name == "gpu-single"
    assert run.state is not None and run.state.name == "HandedOver"
    said = str(run.state.message)
    assert f"flow run {there.id}" in said and f"/runs/flow-run/{there.id}" in said
    _QUEUE.submit(lambda: None).result()  # the one before it has been posted
    of_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))
    [shown] = client.read_artifacts(artifact_filter=of_run)
    assert shown.type == "markdown" and f"/runs/flow-run/{there.id})" in str(shown.data)


def test_a_gpu_pool_computes_on_no_cpu_that_only_the_config_names(client: SyncPrefectClient) -> None:
    run = run_in(client, "gpu-multi", [])
    assert run.state is not None and run.state.is_failed()
    said = str(run.state.message)
    assert "runs in the work pool gpu-multi, and the config's tag 'cpu' belongs to cpu" in said, said
    assert "-p hardware=2xh200" in said and "start pipeline/cpu" in said


def test_what_is_said_in_a_gpu_pool_is_done(client: SyncPrefectClient) -> None:
    run = run_in(client, "gpu-multi", [], hardware="cpu")
    assert run.state is not None and run.state.name == "HandedOver" and "in the pool cpu" in str(run.state.message)
    assert gpu_tags("cpu") == gpu_tags("nobody's") == [] and "1xh200" in gpu_tags("gpu-single")
