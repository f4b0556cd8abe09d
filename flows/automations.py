"""The automations that end lost runs: where a run of ours falls silent, the server marks it Crashed or Cancelled."""

from __future__ import annotations

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType, WorkPool
from prefect.client.schemas.responses import DeploymentResponse
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

from flows.pools import TAG, pools

# Three heartbeats (every 30 s, see prefect.yaml) may be missed, and a server that was away for a minute hears the next
# one before it judges. The automation looks every few seconds: with 90 s a killed run was Crashed after 89-94 s.
SECONDS_WITHOUT_HEARTBEAT = 120
# From Pending to the first heartbeat lie the imports: 5 to 10 s here, longer from a cold network disk.
SECONDS_TO_BEGIN = 150
# All events between; any that is not named here would count as the sign of life that is waited for.
BEFORE_HEARTBEAT = {"Pending", "Submitting", "InfrastructurePending", "pull-step.*", "Running"}
EVENT = "prefect.flow-run."
HEARTBEAT = "PREFECT_FLOWS_HEARTBEAT_FREQUENCY"


def automate(client: SyncPrefectClient, ours: list[DeploymentResponse]) -> None:
    """Without these a run whose process vanished would be Pending or Running, and hold its slot, for ever."""
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
