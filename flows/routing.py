"""A run goes to the work pool of its hardware tag.

A deployment belongs to one pool, but its form lets one choose any tag. A run that lands in the wrong pool hands itself
over to the deployment `pipeline/POOL` and ends at once, so a GPU's pool and its limit of one run see every GPU run.
Runs without a deployment (`make pipeline`) happen where they were started. So does the tag `auto`: the machine that a
run landed on resolves it. A run in a GPU's pool that names no hardware is refused where the config's own tag belongs
elsewhere: one that ended green, computed on a CPU, is not what was asked for.
"""

from __future__ import annotations

from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound
from prefect.states import Completed
from prefect.utilities.urls import url_for

from flows.parameters import hardware_tags
from tasks.artifacts import show_text
from tasks.config import load_config, load_hardware
from tasks.errors import UserError
from tasks.hardware import AUTO

HANDED_OVER = "handed-over"  # tag of a run that was sent to its pool once


def hand_over(asked: str | None, of_config: str, parameters: dict[str, Any]) -> State[None] | None:
    """Start the run in the pool of its tag, when it is not there already; the state that says where it went."""
    tag = asked or of_config
    context = FlowRunContext.get()
    here = context.flow_run.work_pool_name if context and context.flow_run else None
    if tag == AUTO:  # whatever machine it landed on
        return None
    pool = load_hardware(tag).work_pool
    if here is None or here == pool or context is None or context.flow_run is None:
        return None
    if asked is None and (of_gpus := gpu_tags(here)):
        raise UserError(
            f"this deployment runs in the work pool {here}, and the config's tag '{tag}' belongs to {pool}",
            where=f"{parameters['config']}, key hardware",
            allowed=f"the parameter hardware, as one of {', '.join(of_gpus)}",
            todo=f"pass one (-p hardware={of_gpus[0]}), or start pipeline/{pool}",
        )
    if HANDED_OVER in context.flow_run.tags:  # or two wrong deployments would send it back and forth for ever
        raise UserError(
            f"the tag '{tag}' belongs to the work pool {pool}, and the deployment pipeline/{pool} runs in {here}",
            where="prefect.yaml",
            todo="give every deployment pipeline/POOL the work pool POOL, and run `make deploy`",
        )
    try:
        with get_client(sync_client=True) as client:
            target = client.read_deployment_by_name(f"pipeline/{pool}")
            run = client.create_flow_run_from_deployment(
                target.id,
                parameters=parameters | {"hardware": tag},
                tags=[*context.flow_run.tags, HANDED_OVER],  # those by which the caller looks for it
            )
    except ObjectNotFound:
        raise UserError(
            f"the tag '{tag}' belongs to the work pool {pool}, for which there is no deployment pipeline/{pool}",
            where="prefect.yaml",
            todo="add it there and run `make deploy`",
        ) from None
    said = f"'{tag}' runs in the pool {pool}: flow run {run.id}"  # its name it gets when it starts
    link = url_for("flow-run", run.id)
    show_text(load_config(parameters["config"]).name, "handed-over", f"{said}\n\n[{link}]({link})" if link else said)
    return Completed(name="HandedOver", message=f"{said}, {link}" if link else said)


def gpu_tags(pool: str) -> list[str]:
    """The tags of a pool of GPUs; none where it has one without."""
    rows = {tag: load_hardware(tag) for tag in hardware_tags() if tag != AUTO}
    devices = {tag: row.device for tag, row in rows.items() if row.work_pool == pool}
    return [] if "cpu" in devices.values() else list(devices)
