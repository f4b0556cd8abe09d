"""Registers work pools, deployments and the heartbeat automation with the server at PREFECT_API_URL.

    PREFECT_API_URL=http://server:4200/api python -m flows.deploy          (make deploy)

Running it again brings the server to what prefect.yaml says; runs and their history stay.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import State, StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed

from flows.pools import POOL_LIMITS, PREFECT_FILE, pools
from tasks.errors import EXIT_USER_ERROR, UserError

# Three heartbeats (every 30 s, see prefect.yaml) may be missed, and a server that was away for a minute hears the next
# one before it judges. The automation looks every few seconds: with 90 s a killed run was Crashed after 89-94 s.
SECONDS_WITHOUT_HEARTBEAT = 120
ALIVE = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
AUTOMATION = "crashed-without-heartbeat"


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
        automate(client)
    starts_in = root or os.environ.get("STEEP_ROOT") or Path.cwd()
    run_prefect("deploy", "--all", "--prefect-file", str(PREFECT_FILE), STEEP_ROOT=str(starts_in))
    print(f"deployed to {api_url}: pools {', '.join(pools())}; see {PREFECT_FILE}")


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
    """A run whose process vanished sends no heartbeat; without this it would be Running for ever."""
    trigger = EventTrigger(
        posture=Posture.Proactive,
        match={"prefect.resource.id": "prefect.flow-run.*"},
        for_each={"prefect.resource.id"},
        after={"prefect.flow-run.heartbeat"},
        expect={"prefect.flow-run.*"},  # the next heartbeat, or the event of a final state, whatever its name
        threshold=1,
        within=SECONDS_WITHOUT_HEARTBEAT,
    )
    message = f"no heartbeat for {SECONDS_WITHOUT_HEARTBEAT} s; the next run resumes from what stands"
    wanted = AutomationCore(
        name=AUTOMATION,
        description="Marks a run Crashed whose process or machine is gone.",
        trigger=trigger,
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message=message)],
    )
    standing = client.read_automations_by_name(AUTOMATION)
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
