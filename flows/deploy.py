"""Registers work pools, deployments and the automations for lost runs with the server at PREFECT_API_URL.

    PREFECT_API_URL=http://server:4200/api python -m flows.deploy          (make deploy)

Running it again brings the server to what prefect.yaml says; runs and their history stay.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterTags,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import State, StateType, WorkPool
from prefect.client.schemas.responses import DeploymentResponse
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed

from flows.pools import POOL_LIMITS, PREFECT_FILE, TAG, pools
from tasks.errors import EXIT_USER_ERROR, UserError

# Three heartbeats (every 30 s, see prefect.yaml) may be missed, and a server that was away for a minute hears the next
# one before it judges. The automation looks every few seconds: with 90 s a killed run was Crashed after 89-94 s.
SECONDS_WITHOUT_HEARTBEAT = 120
# From Pending to the first heartbeat lie the imports: 5 to 10 s here, longer from a cold network disk.
SECONDS_TO_BEGIN = 150
# All events between; any that is not named here would count as the sign of life that is waited for.
BEFORE_HEARTBEAT = {"Pending", "Submitting", "InfrastructurePending", "pull-step.*", "Running"}
ALIVE = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
EVENT = "prefect.flow-run."
HEARTBEAT = "PREFECT_FLOWS_HEARTBEAT_FREQUENCY"


def main() -> int:
    """The command line; returns the exit code."""
    try:
        url = require_api_url()
        deploy(url)
        if "--mark-lost" in sys.argv:  # from `make serve`, which knows that no worker runs yet
            mark_lost_runs()
    except UserError as error:
        print(f"\n{error}\n", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def require_api_url() -> str:
    """PREFECT_API_URL, or a `UserError`: deployments on a temporary server would be gone at once."""
    if url := os.environ.get("PREFECT_API_URL"):
        return url
    raise UserError(
        "PREFECT_API_URL is not set, so there is no server to deploy to",
        allowed="the address of a Prefect server, as http://127.0.0.1:4200/api",
        todo="`make serve` starts one here and deploys to it; for another: make deploy PREFECT_API_URL=...",
    )


def deploy(api_url: str, root: Path | None = None) -> None:
    """Pools, deployments and automation, each created or brought up to date."""
    with get_client(sync_client=True) as client:
        for pool in pools():
            limit_pool(client, pool, POOL_LIMITS.get(pool, 1))
        starts_in = root or os.environ.get("STEEP_ROOT") or Path.cwd()
        register(read_file(), str(starts_in))
        automate(client)
    print(f"deployed to {api_url}: pools {', '.join(pools())}; see {PREFECT_FILE}")


def read_file() -> dict[str, Any]:
    """prefect.yaml, every deployment with our tag."""
    said: dict[str, Any] = yaml.safe_load(PREFECT_FILE.read_text())
    for entry in said["deployments"]:
        if HEARTBEAT not in (entry["work_pool"].get("job_variables") or {}).get("env", {}):
            raise UserError(
                f"the deployment {entry['name']} of {entry['entrypoint']} sets no {HEARTBEAT}",
                where=str(PREFECT_FILE),
                todo="give it a `work_pool` as the others have: a run that sends no heartbeat is marked Crashed",
            )
        entry["tags"] = sorted({*entry.get("tags", []), TAG})
    return said


def register(said: dict[str, Any], starts_in: str) -> None:
    """Create or update the deployments, with Prefect's own command."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(said, file)
        file.flush()
        run_prefect("deploy", "--all", "--prefect-file", file.name, STEEP_ROOT=starts_in)


def mark_lost_runs() -> None:
    """Mark every live run of our pools Crashed, as none of their workers runs: after a restart of the machine."""
    alive = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=ALIVE)))
    ours = WorkPoolFilter(name=WorkPoolFilterName(any_=pools()))
    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_run_filter=alive, work_pool_filter=ours):
            state: State[None] = Crashed(message="its worker ended; the next run resumes from what stands")
            client.set_flow_run_state(run.id, state, force=True)
            print(f"{run.name} was running when its worker ended: marked Crashed; the next run resumes it")


def limit_pool(client: SyncPrefectClient, name: str, limit: int) -> None:
    """Create a pool with its limit of runs; one that stands keeps its type and the limit that somebody gave it."""
    try:
        client.read_work_pool(name)
    except ObjectNotFound:
        client.create_work_pool(WorkPoolCreate(name=name, type="process", concurrency_limit=limit))


def automate(client: SyncPrefectClient) -> None:
    """Without these a run whose process vanished would be Pending or Running, and hold its slot, for ever."""
    ours = client.read_deployments(deployment_filter=DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG])))
    at_once = begin_at_once([client.read_work_pool(pool) for pool in pools()], ours)
    lost = ChangeFlowRunState(
        state=StateType.CRASHED,
        message=f"no heartbeat for {SECONDS_WITHOUT_HEARTBEAT} s; the next run resumes from what stands",
    )
    put_automation(client, "crashed-without-heartbeat", silence({"heartbeat"}, SECONDS_WITHOUT_HEARTBEAT), lost)
    never_began = ChangeFlowRunState(
        state=StateType.CRASHED,
        message=f"it did not begin within {SECONDS_TO_BEGIN} s: its worker or its process is gone",
    )
    put_automation(
        client, "crashed-before-heartbeat", silence(BEFORE_HEARTBEAT, SECONDS_TO_BEGIN, at_once), never_began
    )
    # Prefect lets a run that is Cancelling become Cancelled and nothing else; by itself it does that after 300 s.
    nobody = ChangeFlowRunState(state=StateType.CANCELLED, message="nobody was left who could have cancelled it")
    put_automation(client, "cancelled-without-process", silence({"Cancelling"}, SECONDS_WITHOUT_HEARTBEAT), nobody)


def silence(after: set[str], seconds: int, deployments: list[str] | None = None) -> EventTrigger:
    """Fires where no event of a run follows one of these; of the runs of these deployments only (None: of all of ours).

    Every run of ours has the tag, by its deployment or from `flows.pipeline`; events of states and heartbeats name it.
    """
    tagged: dict[str, str | list[str]] = {"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{TAG}"}
    one_of_these = {"prefect.resource.role": "deployment", "prefect.resource.id": deployments or []}
    return EventTrigger(
        posture=Posture.Proactive,
        match={"prefect.resource.id": f"{EVENT}*"},
        match_related=tagged if deployments is None else one_of_these,
        for_each={"prefect.resource.id"},
        after={f"{EVENT}{name}" for name in after},
        expect={f"{EVENT}*"},  # the next heartbeat, or the event of a state, whatever its name
        threshold=1,
        within=seconds,
    )


def begin_at_once(work_pools: list[WorkPool], deployments: list[DeploymentResponse]) -> list[str]:
    """The deployments whose runs begin as soon as they are Pending, and send heartbeats then.

    One that Slurm (`srun` in the command) or Kubernetes starts may be Pending for hours: its queue is not Prefect's.
    """
    direct = set()
    for pool in work_pools:
        command = pool.base_job_template.get("job_configuration", {}).get("command", "{{ command }}")
        variable = pool.base_job_template.get("variables", {}).get("properties", {}).get("command", {})
        if pool.type == "process" and command == "{{ command }}" and not variable.get("default"):
            direct.add(pool.name)
    return [
        f"prefect.deployment.{deployment.id}"
        for deployment in deployments
        if deployment.work_pool_name in direct
        and not deployment.job_variables.get("command")
        and HEARTBEAT in deployment.job_variables.get("env", {})
    ]


def put_automation(client: SyncPrefectClient, name: str, trigger: EventTrigger, action: ChangeFlowRunState) -> None:
    """Create an automation, or bring the one of that name up to date."""
    wanted = AutomationCore(
        name=name,
        description="Ends a run whose process or machine is gone.",
        trigger=trigger,
        actions=[action],
    )
    standing = client.read_automations_by_name(name)
    if standing:
        client.update_automation(standing[0].id, wanted)
    else:
        client.create_automation(wanted)


def run_prefect(*arguments: str, **environment: str) -> None:
    """Prefect's own command line, quiet unless it fails."""
    command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise UserError(f"`prefect {' '.join(arguments)}` failed:\n{said}", where=str(PREFECT_FILE))


if __name__ == "__main__":
    sys.exit(main())
