"""Deployments, schedule, reuse and what one sees, on a real server with a real worker."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import socket
import time
import urllib.request
from datetime import UTC, datetime, timedelta
from typing import Any

import psutil
import pytest

from flows.postgres import find_binaries
from tests.conftest import laws, set_activation, write_lines
from tests.operations.conftest import FINAL, SECONDS_FOR_A_RUN, Served, wait_for

pytestmark = [pytest.mark.operations, pytest.mark.timeout(1800)]  # the first test also waits for the server and a run
STAGES = {"prepare_cpt", "prepare_sft", "cpt", "sft", "evaluate", "report"}


def test_every_stage_completes_and_shows_what_it_did(served: Served, first_run: str) -> None:
    assert served.task_states(first_run) == dict.fromkeys(STAGES, "Completed")
    assert served.api(f"/flow_runs/{first_run}")["name"] == "regulator on cpu"
    shown = served.artifacts(first_run)
    for key in ("plan", "prepare-cpt-ledger", "prepare-cpt-mix", "prepare-sft-ledger", "evaluation", "results"):
        assert json.loads(shown[key]["data"]), key
    assert {"cpt-progress", "sft-progress", "prepare-cpt-progress", "evaluate-base-progress"} <= set(shown)
    assert shown["cpt-progress"]["data"] == 100.0
    assert all(word in shown["cpt-progress"]["description"] for word in ("step", "tok/s", "ETA"))


def test_the_loss_curve_is_a_picture_and_the_links_open(served: Served, first_run: str) -> None:
    shown = served.artifacts(first_run)
    picture = shown["cpt-loss"]["data"].split("base64,")[1].split(")")[0]
    assert b"<polyline" in base64.b64decode(picture)
    link = shown["report"]["data"].split("](")[1].split(")")[0]
    with urllib.request.urlopen(link) as answer:
        assert b"tiny_bpb" in answer.read()
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]


def test_log_lines_arrive_within_two_seconds(served: Served) -> None:
    shutil.copy(served.project / "configs/regulator.yaml", served.project / "configs/logs.yaml")
    change(served, "configs/logs.yaml", "seed: 0", "seed: 5")
    run_id = served.start_run("prepare/stage", config="configs/logs.yaml")
    seen: dict[str, float] = {}
    while served.api(f"/flow_runs/{run_id}")["state_type"] not in ("COMPLETED", "FAILED"):
        for line in served.logs(run_id):
            seen.setdefault(line["id"], time.time() - seconds(line["timestamp"]))
        time.sleep(0.2)
    late = [delay for delay in seen.values() if delay > 2.0]
    assert len(seen) > 5 and not late, sorted(late)


def test_the_servers_automations_act(served: Served) -> None:
    """Those that end lost runs call the server in memory, by a name that the guard on `Host` knows nothing of."""
    trigger = {"type": "event", "posture": "Reactive", "expect": ["prefect.flow-run.Scheduled"], "threshold": 1, "within": 0,
               "match_related": {"prefect.resource.role": "tag", "prefect.resource.id": "prefect.tag.probe"}}  # fmt: skip
    action = {"type": "change-flow-run-state", "state": "CANCELLED", "name": "Probed"}
    served.api("/automations/", {"name": "probe", "trigger": trigger, "actions": [action]})
    deployment = served.api("/deployments/name/pipeline/cpu")["id"]
    later = {
        "type": "SCHEDULED",
        "state_details": {"scheduled_time": f"{datetime.now(UTC) + timedelta(days=1):%FT%TZ}"},
    }
    run = served.api(f"/deployments/{deployment}/create_flow_run", {"tags": ["probe"], "state": later})
    wait_for(lambda: served.api(f"/flow_runs/{run['id']}")["state_name"] == "Probed", 60)


def test_a_schedule_over_unchanged_data_reuses_everything_in_ten_seconds(served: Served, first_run: str) -> None:
    run = run_by_schedule(served)
    assert run["state_name"] == "Completed", run["state"]["message"]
    assert served.task_states(run["id"]) == dict.fromkeys(STAGES, "Cached")
    took = seconds(run["end_time"]) - seconds(run["start_time"])
    print(f"a scheduled run over unchanged data: {took:.1f} s")
    assert took <= 10


def test_a_new_file_runs_what_depends_on_it_and_nothing_else(served: Served, first_run: str) -> None:
    write_lines(served.project / "laws2.jsonl", laws(3, first=5000))
    run = run_by_schedule(served)
    assert served.task_states(run["id"]) == dict.fromkeys(STAGES, "Completed") | {"prepare_sft": "Cached"}
    plan = {row["stage"]: row for row in json.loads(served.artifacts(run["id"])["plan"]["data"])}
    assert [stage for stage in plan if plan[stage]["does"] == "reuse"] == ["prepare_sft", "evaluate_base"]
    assert "laws2.jsonl is new" in plan["prepare_cpt"]["why"]


WRONG = {
    "hardware": ("cpux", "'cpux' is not one of ['cpu', 'cpu-x2'"),
    "config": ("../secrets.yaml", "a YAML file below the project, as configs/regulator.yaml"),
    "only": ("train", "'train' is not one of ['prepare', 'cpt', 'sft', 'evaluate', 'report']"),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_server_refuses_a_wrong_parameter(served: Served, name: str) -> None:
    value, said = WRONG[name]
    with pytest.raises(AssertionError, match=r"409|422") as refused:
        served.start_run(**{name: value})
    assert said in str(refused.value)


SLIPS = [
    ("hardware", "cpux", "did you mean 'cpu'"),
    ("config", "configs/gone.yaml", "configs/gone.yaml"),
    ("config", "/etc/hostname", "a deployment's config cannot be '/etc/hostname'"),
    ("only", "cptt", "no stage is called 'cptt'"),
]


def test_what_slips_through_fails_at_once_with_our_message(served: Served) -> None:
    """As from a form whose box "Validate parameters" is not ticked."""
    deployment = served.api("/deployments/name/pipeline/cpu")["id"]
    runs = []
    for name, value, _ in SLIPS:
        asked = {"parameters": {name: value}, "enforce_parameter_schema": False}
        runs.append(served.api(f"/deployments/{deployment}/create_flow_run", asked)["id"])
    for run_id, (_, _, said) in zip(runs, SLIPS, strict=True):
        run = served.wait_for_run(run_id)
        assert run["state_name"] == "Failed" and said in run["state"]["message"], run["state"]
        assert "error:" in run["state"]["message"] and "pydantic" not in run["state"]["message"]


def test_a_config_that_is_wrong_inside_fails_with_our_message(served: Served) -> None:
    shutil.copy(served.project / "configs/regulator.yaml", served.project / "configs/wrong.yaml")
    change(served, "configs/wrong.yaml", "tokens: 4096", "tokens: -1")
    run_id = served.start_run(config="configs/wrong.yaml")
    run = served.wait_for_run(run_id)
    assert run["state_name"] == "Failed"
    assert "configs/wrong.yaml:11, key cpt.tokens" in run["state"]["message"]
    logged = "\n".join(line["message"] for line in wait_for(lambda: served.logs(run_id)))
    assert "Traceback" not in logged


def test_a_run_marked_crashed_goes_on_and_the_next_one_takes_its_result_over(served: Served) -> None:
    """As after a server that was away for too long: the mark ends no process."""
    shutil.copy(served.project / "configs/regulator.yaml", served.project / "configs/away.yaml")
    change(served, "configs/away.yaml", "seed: 0", "seed: 9")
    first = served.start_run(config="configs/away.yaml", until="cpt")
    wait_for(lambda: cpt_states(served, first) == ["Running"], 120)
    served.api(f"/flow_runs/{first}/set_state", {"state": {"type": "CRASHED", "name": "Crashed"}, "force": True})
    second = served.wait_for_run(served.start_run(config="configs/away.yaml", until="cpt"))
    assert second["state_name"] == "Completed", second["state"]["message"]
    assert served.task_states(second["id"])["cpt"] == "Cached"
    wait_for(lambda: served.api(f"/flow_runs/{first}")["state_name"] == "Completed", 60)
    assert served.task_states(first)["cpt"] == "Completed"


def test_weights_that_are_cut_off_fail_with_our_message(served: Served) -> None:
    config = of_a_broken_base(served, "cut")
    weights = served.project / "cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    run = served.wait_for_run(served.start_run(config=config, until="cpt"))
    assert run["state_name"] == "Failed"
    assert "safetensor" in run["state"]["message"].lower(), run["state"]["message"]
    assert "Traceback" not in run["state"]["message"]


@pytest.mark.parametrize("tag", ["cpu", "cpu-x2"])
def test_the_last_lines_of_a_worker_that_dies_stand_in_the_error(served: Served, tag: str) -> None:
    """A model of another version of transformers: an activation that ours does not know is a KeyError there."""
    config = of_a_broken_base(served, f"crash-{tag}")
    set_activation(served.project / f"crash-{tag}/config.json", f"of_tomorrow_{tag}")  # a stage of its own
    before = set((served.project / "runs").glob("cpt-*"))
    run = served.wait_for_run(served.start_run(config=config, hardware=tag, until="cpt"))
    said = run["state"]["message"]
    assert run["state_name"] == "Failed" and "tasks.training cpt-" in said and "exited with 1; the end of" in said, said
    [directory] = set((served.project / "runs").glob("cpt-*")) - before
    log = [line.rstrip() for line in (directory / "worker.log").read_text().splitlines()]
    shown = [line.removeprefix("  | ") for line in said.splitlines() if line.startswith("  | ")]
    assert shown and shown == [line for line in log if line][-len(shown) :], said
    reason = [line.strip() for line in shown if line.strip("=")][-1]  # torchrun frames its report
    assert reason.startswith("KeyError: ") and "of_tomorrow" in reason, said
    assert any("transformers" in line for line in shown), "not only the last line: where it died"


def test_a_tag_of_another_pool_goes_to_that_pool(served: Served) -> None:
    run = served.wait_for_run(served.start_run(hardware="1xh200"))
    assert run["state_name"] == "HandedOver"
    wanted = {"flow_runs": {"tags": {"all_": ["handed-over"]}}}
    [there] = served.api("/flow_runs/filter", wanted)
    assert there["work_pool_name"] == "gpu-single" and there["parameters"]["hardware"] == "1xh200"
    served.api(f"/flow_runs/{there['id']}", method="DELETE")


def test_it_listens_on_loopback_alone(served: Served, first_run: str) -> None:
    """All that `make serve` started: server, workers, file view, database, also while a run trains."""
    run_id = served.start_run(config="configs/regulator.yaml", force="sft", only="sft")
    listening: set[str] = set()

    def trained() -> bool:
        for process in psutil.Process(served.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                listening.update(f"{c.laddr.ip}:{c.laddr.port}" for c in process.net_connections("inet")
                                 if c.status == psutil.CONN_LISTEN or c.type == socket.SOCK_DGRAM)  # fmt: skip
        return served.api(f"/flow_runs/{run_id}")["state_type"] in FINAL

    wait_for(trained, SECONDS_FOR_A_RUN)
    port = int(served.url.rpartition(":")[2])
    assert {f"127.0.0.1:{port}", f"127.0.0.1:{port + 1}"} <= listening
    assert [address for address in listening if not address.startswith("127.")] == []


def test_postgresql_is_used_where_it_is_installed(served: Served) -> None:
    if find_binaries() is None:
        pytest.skip("PostgreSQL is not installed here: Debian's package is postgresql")
    said = served.output.read_text()
    assert "PostgreSQL in" in said
    assert "database is locked" not in (served.project / ".prefect/logs/server.log").read_text()


def run_by_schedule(served: Served) -> dict[str, Any]:
    """Give the deployment a schedule that fires within a minute; the run that it made, once it has ended."""
    deployment = served.api("/deployments/name/pipeline/cpu")["id"]
    schedule = [{"active": True, "schedule": {"cron": "* * * * *", "timezone": "UTC"}}]
    [made] = served.api(f"/deployments/{deployment}/schedules", schedule)
    wanted = {"flow_runs": {"tags": {"all_": ["auto-scheduled"]}, "state": {"type": {"any_": ["RUNNING", "PENDING"]}}}}
    try:
        [run] = wait_for(lambda: served.api("/flow_runs/filter", wanted), 120)
    finally:
        served.api(f"/deployments/{deployment}/schedules/{made['id']}", method="DELETE")
    return served.wait_for_run(run["id"])


def cpt_states(served: Served, run_id: str) -> list[str]:
    found = served.api("/task_runs/filter", {"flow_runs": {"id": {"any_": [run_id]}}})
    return [task["state_name"] for task in found if task["name"] == "cpt"]


def of_a_broken_base(served: Served, name: str) -> str:
    """A config of a model of its own, which a test may break."""
    shutil.copy(served.project / "configs/regulator.yaml", served.project / f"configs/{name}.yaml")
    change(served, f"configs/{name}.yaml", "path: ./base", f"path: ./{name}")
    shutil.copytree(served.project / "base", served.project / name)
    return f"configs/{name}.yaml"


def change(served: Served, config: str, before: str, after: str) -> None:
    path = served.project / config
    text = path.read_text()
    assert text.count(before) == 1, text
    path.write_text(text.replace(before, after))


def seconds(timestamp: str) -> float:
    return datetime.fromisoformat(timestamp.replace("Z", "+00:00")).timestamp()
