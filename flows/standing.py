"""What `make deploy` leaves of what stands: prefect.yaml against what somebody changed on the server.

Three are compared, field by field: the file, the file of the last deploy (kept in a Prefect variable a deployment), and
the server. What the file says anew is set. Where it says what it said before, the server's stays: a schedule that
somebody switched off, a pause, a parameter. So a restart of `make serve` undoes nothing.
"""

from __future__ import annotations

import json
import re
from typing import Any

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.objects import DeploymentSchedule
from prefect.client.schemas.responses import DeploymentResponse
from prefect.variables import Variable
from pydantic import ValidationError

from flows.pools import PREFECT_FILE, TAG
from tasks.errors import UserError

# A label names a field: `paused`, `parameter NAME`, `schedule SLUG` (when it fires), `active SLUG` (whether it does).
Fields = dict[str, Any]
PAUSED, PARAMETER, SCHEDULE, ACTIVE = "paused", "parameter ", "schedule ", "active "
ABSENT = None  # as YAML and JSON have it: `x:` says nothing
PROJECT = "project"  # kept beside the fields: the name in the prefect.yaml that was deployed


def fields_of_file(name: str, entry: dict[str, Any]) -> Fields:
    """The fields of an entry of prefect.yaml. Raises `UserError` for a schedule that cannot be one."""
    said: Fields = {PAUSED: bool(entry.get("paused"))}
    said |= {PARAMETER + key: value for key, value in (entry.get("parameters") or {}).items()}
    for schedule in entry.get("schedules") or []:
        slug, active, when = schedule.get("slug"), schedule.get("active", True), dict(schedule)
        for known in ("slug", "active"):
            when.pop(known, None)
        if not slug:
            raise UserError(f"a schedule of {name} has no slug, by which a later deploy would know it",
                            where=str(PREFECT_FILE), todo="give it one, as {slug: nightly, cron: ...}")  # fmt: skip
        said |= {SCHEDULE + slug: when, ACTIVE + slug: active}
        try:
            as_schedule(slug, when, active)
        except ValidationError as error:
            raise UserError(f"the schedule '{slug}' of {name} is none: {error.errors()[0]['msg']}",
                            where=str(PREFECT_FILE), allowed="cron, interval (in seconds) or rrule, and timezone",
                            todo="correct it and run `make deploy` again") from None  # fmt: skip
    return dict(json.loads(json.dumps(said, default=str)))  # as the server gives the last ones back


def fields_of_server(standing: DeploymentResponse) -> Fields:
    """The fields of a deployment that stands; schedules without a slug were made on the server and are not ours."""
    there: Fields = {PAUSED: standing.paused}
    there |= {PARAMETER + key: value for key, value in standing.parameters.items()}
    for schedule in standing.schedules:
        if schedule.slug:
            there |= {SCHEDULE + schedule.slug: schedule, ACTIVE + schedule.slug: schedule.active}
    return there


def settle(said: Fields, last: Fields | None, there: Fields) -> Fields:
    """Each field as the file says it where that is new, and as it stands on the server where it is not.

    Without a last deploy that is known, what stands counts as deployed from this very file.
    """
    if last is None:
        last = {label: said.get(label) for label in there}
    news = {label for label in said | last if said.get(label) != last.get(label)}
    return {label: (said if label in news else there).get(label) for label in said | last | there}


def notes(name: str, said: Fields, there: Fields, settled: Fields) -> list[str]:
    """A line for each field that the server has otherwise than the file, whether it is kept or set."""
    lines = []
    for label, value in settled.items():
        mine, theirs = said.get(label), there.get(label)
        if not _same(mine, theirs):
            verb = "kept" if value is theirs else "set"
            lines.append(f"{verb}: {name}: {label}: {_text(theirs)} on the server, {_text(mine)} in {PREFECT_FILE}")
    return lines


def parameters_of(settled: Fields) -> dict[str, Any]:
    """The default parameters of a deployment."""
    named = {label: value for label, value in settled.items() if label.startswith(PARAMETER)}
    return {label.removeprefix(PARAMETER): value for label, value in named.items() if value is not ABSENT}


def put_schedules(client: SyncPrefectClient, deployment: DeploymentResponse, settled: Fields) -> None:
    """Create, change and delete the schedules with our slugs; only what differs, as each change drops planned runs."""
    standing = {schedule.slug: schedule for schedule in deployment.schedules if schedule.slug}
    for slug in [label.removeprefix(SCHEDULE) for label in settled if label.startswith(SCHEDULE)]:
        when, active, there = settled[SCHEDULE + slug], settled.get(ACTIVE + slug), standing.get(slug)
        active = True if active is ABSENT else active
        if when is ABSENT:
            if there:
                client.delete_deployment_schedule(deployment.id, there.id)
        elif there is None:
            client.create_deployment_schedules(deployment.id, [as_schedule(slug, when, active)])
        else:
            wanted = as_schedule(slug, when, active) if isinstance(when, dict) else there
            if there.active != active or (wanted is not there and not _same(when, there)):
                client.update_deployment_schedule(
                    deployment.id, there.id, active=active, schedule=wanted.schedule, parameters=wanted.parameters
                )


def as_schedule(slug: str, when: dict[str, Any], active: bool) -> DeploymentScheduleCreate:
    """A schedule of the file as Prefect has it."""
    timing: Any = {key: value for key, value in when.items() if key != "parameters"}
    return DeploymentScheduleCreate(schedule=timing, active=active, slug=slug, parameters=when.get("parameters") or {})


def read_last(name: str) -> Fields | None:
    """What the file said of a deployment when it was last deployed."""
    if (last := _kept(name)) is None:
        return None
    return {label: value for label, value in last.items() if label != PROJECT}


def project_of_last(name: str) -> str | None:
    """Which project deployed it last; None where that was not written down, or nobody here did."""
    return (_kept(name) or {}).get(PROJECT)


def keep_last(name: str, said: Fields, project: str) -> None:
    """Remember what the file says of a deployment, and whose file that is."""
    Variable.set(_variable(name), said | {PROJECT: project}, tags=[TAG], overwrite=True)


def _kept(name: str) -> Fields | None:
    last = Variable.get(_variable(name), default=None)
    return dict(last) if isinstance(last, dict) else None


def _variable(name: str) -> str:
    return f"{TAG}_deployed_" + re.sub(r"[^a-z0-9]+", "_", name.lower())


def _same(mine: Any, theirs: Any) -> bool:
    if not isinstance(theirs, DeploymentSchedule) or not isinstance(mine, dict):
        return bool(mine == theirs)
    ours = as_schedule(str(theirs.slug), mine, theirs.active)
    given = ours.schedule.model_fields_set  # what the file leaves out, Prefect fills in, the time of day among it
    return ours.parameters == theirs.parameters and all(
        getattr(ours.schedule, key) == getattr(theirs.schedule, key, ABSENT) for key in given
    )


def _text(value: Any) -> str:
    if isinstance(value, DeploymentSchedule):
        value = value.schedule.model_dump(mode="json", exclude_none=True)
    return "not there" if value is ABSENT else json.dumps(value, default=str)
