"""Registers work pools, deployments and the automations for lost runs with the server at PREFECT_API_URL.

    PREFECT_API_URL=http://server:4200/api python -m flows.deploy          (make deploy)

Running it again brings the server to what prefect.yaml says anew; what somebody changed on the server since stays
(flows/standing.py), and so do runs and their history.
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
from prefect.client.schemas.objects import State, StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectNotFound
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.states import Crashed
from prefect.utilities.schema_tools import ValidationError, validate

from flows import standing
from flows.automations import HEARTBEAT, automate
from flows.pools import POOL_LIMITS, PREFECT_FILE, TAG, pools
from flows.reach import NO_PROFILES, require_server
from tasks.errors import EXIT_USER_ERROR, UserError

ALIVE = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]


def main() -> int:
    """The command line; returns the exit code."""
    try:
        url = require_api_url()
        require_server()
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
        todo="`make serve` starts one here and deploys to it; for another: make deploy PREFECT_API_URL=... "
        f"({NO_PROFILES})",
    )


def deploy(api_url: str, root: Path | None = None) -> None:
    """Pools, deployments and automation, each created or brought up to date."""
    with get_client(sync_client=True) as client:
        said = read_file()
        for pool in pools():
            limit_pool(client, pool, POOL_LIMITS.get(pool, 1))
        starts_in = root or os.environ.get("STEEP_ROOT") or Path.cwd()
        lines = register(client, said, str(starts_in))
        lines += retire(client, [full_name(entry) for entry in said["deployments"]], project_of(said))
        automate(client, our_deployments(client))
    print("\n".join([*lines, f"deployed to {api_url}: pools {', '.join(pools())}; see {PREFECT_FILE}"]))


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
        check_parameters(entry)
        entry["tags"] = sorted({*entry.get("tags", []), TAG})
    return said


def project_of(said: dict[str, Any]) -> str:
    """What tells this project's deployments from those of others that start in the same folder."""
    return str(said.get("name") or "")


def check_parameters(entry: dict[str, Any]) -> None:
    """Raise `UserError` for what the server would refuse, and for a name that the flow does not know."""
    given, name = entry.get("parameters") or {}, full_name(entry)
    schema = load_flow(entry).parameters.model_dump()
    try:
        validate(given, schema, raise_on_error=True, ignore_required=True)
    except ValidationError as error:
        raise UserError(f"the parameters of {name}: {error}", where=str(PREFECT_FILE)) from None
    if unknown := [key for key in given if key not in schema["properties"]]:
        raise UserError(f"{name} has no parameter '{unknown[0]}'", where=str(PREFECT_FILE),
                        allowed=", ".join(schema["properties"]))  # fmt: skip


def register(client: SyncPrefectClient, said: dict[str, Any], starts_in: str) -> list[str]:
    """Create or update the deployments; a line for each field that the server has otherwise than the file."""
    lines: list[str] = []
    plan: dict[str, tuple[standing.Fields, standing.Fields]] = {}
    entries = []
    for entry in said["deployments"]:
        name = full_name(entry)
        fields = settled = standing.fields_of_file(name, entry)
        if found := read_deployment(client, name):
            there = standing.fields_of_server(found)
            settled = standing.settle(fields, standing.read_last(name), there)
            lines += standing.notes(name, fields, there, settled)
        plan[name] = fields, settled
        entry = {key: value for key, value in entry.items() if key != "schedules"}  # they are put one by one below
        entries.append(entry | {"parameters": standing.parameters_of(settled), "paused": settled[standing.PAUSED]})
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(said | {"deployments": entries}, file)
        file.flush()
        run_prefect("deploy", "--all", "--prefect-file", file.name, STEEP_ROOT=starts_in)
    for name, (fields, settled) in plan.items():
        standing.put_schedules(client, client.read_deployment_by_name(name), settled)
        standing.keep_last(name, fields, project_of(said))
    return lines


def retire(client: SyncPrefectClient, names: list[str], project: str) -> list[str]:
    """Pause what an earlier deploy of this project made and the file no longer has; a line for each.

    On a shared server two clones have the same name, and two images the same folder: ours has our name and our folder.
    """
    lines = []
    here = client.read_deployment_by_name(names[0]).pull_steps
    for deployment in our_deployments(client):
        name = f"{client.read_flow(deployment.flow_id).name}/{deployment.name}"
        if name in names or deployment.paused:
            continue
        if deployment.pull_steps == here and standing.project_of_last(name) == project:
            client.pause_deployment(deployment.id)
            # by us: when the file has it again, that is new, and it runs again
            standing.keep_last(name, (standing.read_last(name) or {}) | {standing.PAUSED: True}, project)
            lines.append(f"paused: {name}: it is no longer in {PREFECT_FILE}; delete it in the UI if nobody needs it")
    return lines


def full_name(entry: dict[str, Any]) -> str:
    """`pipeline/cpu`."""
    return f"{load_flow(entry).name}/{entry['name']}"


def load_flow(entry: dict[str, Any]) -> Flow[..., Any]:
    """The flow of an entry of the file."""
    try:
        return load_flow_from_entrypoint(entry["entrypoint"])
    except Exception as error:  # whatever its import raises
        raise UserError(f"the entrypoint {entry['entrypoint']} cannot be loaded: {error}", where=str(PREFECT_FILE),
                        allowed="module:flow, as flows.pipeline:pipeline") from error  # fmt: skip


def read_deployment(client: SyncPrefectClient, name: str) -> DeploymentResponse | None:
    """The deployment of that name, if it stands."""
    try:
        return client.read_deployment_by_name(name)
    except ObjectNotFound:
        return None


def our_deployments(client: SyncPrefectClient) -> list[DeploymentResponse]:
    """All that an earlier deploy, or this one, made."""
    return client.read_deployments(deployment_filter=DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG])))


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


def run_prefect(*arguments: str, **environment: str) -> None:
    """Prefect's own command line, quiet unless it fails."""
    command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)
    if done.returncode:
        raise UserError(
            f"`prefect {arguments[0]}` failed:\n{end_of(done.stdout + done.stderr)}", where=str(PREFECT_FILE)
        )


def end_of(output: str) -> str:
    """The last lines; of a traceback only what it ends with."""
    lines = output.strip().splitlines()[-15:]
    indented = [number for number, line in enumerate(lines) if line.startswith('  File "')]
    return "\n".join(line for line in lines[indented[-1] if indented else 0 :] if not indented or line[:1] != " ")


if __name__ == "__main__":
    sys.exit(main())
