"""A run by schedule ends at once while one like it runs.

It would compute the same: a run reads the data when it starts, not when it was due. Waiting for the other's lock it
would hold a slot of its pool, for days where a training takes days, and whatever else wants a slot would wait too;
after a time without workers all the runs that were missed start together. Runs by hand wait, as who started them asked.
"""

from __future__ import annotations

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.context import FlowRunContext
from prefect.states import Completed

BY_SCHEDULE = "auto-scheduled"  # Prefect's tag of a run that a schedule made; whom it hands over to has it too
LIVE = [StateType.RUNNING, StateType.CANCELLING]


def skip() -> State[None] | None:
    """The state of a run by schedule that need not run, as one of its deployment and parameters began before it."""
    context = FlowRunContext.get()
    here = context.flow_run if context else None
    if here is None or here.deployment_id is None or BY_SCHEDULE not in here.tags:
        return None
    live = FlowRunFilter(
        deployment_id=FlowRunFilterDeploymentId(any_=[here.deployment_id]),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=LIVE)),
    )
    with get_client(sync_client=True) as client:
        mine = client.read_flow_run(here.id)  # as the server has it, like the others
        first = first_alike(mine, client.read_flow_runs(flow_run_filter=live))
    if first.id == here.id:
        return None
    return Completed(
        name="Skipped", message=f"flow run '{first.name}' ({first.id}) of this deployment is already running"
    )


def first_alike(mine: FlowRun, live: list[FlowRun]) -> FlowRun:
    """Of a run and those with its parameters, the one that began first: all of them agree on which that is."""
    alike = [mine, *(run for run in live if run.start_time and run.parameters == mine.parameters)]
    return min(alike, key=lambda run: (run.start_time, run.id))
