"""prefect.yaml, the forms' schemas and the rows of hardware.yaml agree; no server needed."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml
from prefect.utilities.callables import parameter_schema

from flows import serve
from flows.deploy import read_file
from flows.parameters import CONFIG_PATTERN, hardware_tags
from flows.pools import POOL_LIMITS, pools
from flows.services import LONG_LIFE_SECONDS, LONGEST_PAUSE_SECONDS, Service, first_start, revive, seconds_to_stop
from flows.standing import fields_of_file
from tasks.config import load_hardware
from tasks.errors import UserError
from tasks.hardware import AUTO
from tests.conftest import ROOT
from tests.operations.conftest import free_port

PREFECT_YAML = (ROOT / "prefect.yaml").read_text()
DEPLOYMENTS = yaml.safe_load(PREFECT_YAML)["deployments"]
# The page's recipe for a deployment of one's own, behind ours.
[RECIPE] = re.findall(r"(?m)^    (  - name: mine\n(?:      .*\n)+)", (ROOT / "flows/README.md").read_text())
WITH_RECIPE = PREFECT_YAML + "\n" + re.sub(r"(?m)^    ", "", RECIPE)


@pytest.mark.parametrize("text", [PREFECT_YAML, WITH_RECIPE], ids=["ours", "with the recipe"])
def test_every_tag_has_a_pool_and_every_pool_a_pipeline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    tags = hardware_tags()
    assert len(tags) > 2
    wanted = {load_hardware(tag).work_pool for tag in tags if tag != AUTO}
    (tmp_path / "prefect.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    pipelines = [d for d in read_file()["deployments"] if d["entrypoint"] == "flows.pipeline:pipeline"]
    assert wanted <= {d["name"] for d in pipelines if d["name"] == d["work_pool"]["name"]} == set(pools())
    assert set(pools()) == set(POOL_LIMITS)


@pytest.mark.parametrize("text", [PREFECT_YAML, WITH_RECIPE], ids=["ours", "with the recipe"])
def test_a_deployments_pool_is_that_of_its_tag(text: str) -> None:
    """One that is called as a pool takes what is handed over to that pool."""
    for deployment in yaml.safe_load(text)["deployments"]:
        pool, parameters = deployment["work_pool"]["name"], deployment["parameters"]
        if deployment["name"] in POOL_LIMITS:
            assert deployment["name"] == pool
        if "hardware" in parameters:
            assert load_hardware(parameters["hardware"]).work_pool == pool


def test_the_recipe_for_a_deployment_of_ones_own_is_one() -> None:
    mine = yaml.safe_load(WITH_RECIPE)["deployments"][-1]
    fields = fields_of_file("pipeline/mine", mine)
    assert mine["name"] == "mine" and any(label.startswith("schedule ") for label in fields)


def test_each_stage_has_a_deployment_that_can_be_imported() -> None:
    names = {deployment["entrypoint"] for deployment in DEPLOYMENTS}
    assert {f"flows.stages:{stage}" for stage in ("prepare", "cpt", "sft", "evaluate", "report")} <= names
    for entrypoint in names:
        module, name = entrypoint.split(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_gpu_pools_take_one_run_at_a_time() -> None:
    assert {limit for pool, limit in POOL_LIMITS.items() if pool.startswith("gpu")} == {1}


def test_no_deployment_has_a_limit_whose_lease_a_restarted_server_forgets() -> None:
    assert [deployment["name"] for deployment in DEPLOYMENTS if "concurrency_limit" in deployment] == []


def test_no_secret_stands_in_what_prefect_stores_in_plain_text() -> None:
    text = (ROOT / "prefect.yaml").read_text()
    assert not re.search(r"token|key|password|prefect\.blocks\.secret", text, re.IGNORECASE)


def test_the_form_knows_tags_stages_and_paths() -> None:
    from flows.pipeline import pipeline

    schema = parameter_schema(pipeline.fn).properties
    assert schema["hardware"]["anyOf"][0]["enum"] == hardware_tags()
    assert "sft" in schema["force"]["anyOf"][0]["enum"]
    assert all(field["description"] for field in schema.values())


@pytest.mark.parametrize("path", ["configs/a.yaml", "my/own-1.yml"])
def test_paths_below_the_project_are_taken(path: str) -> None:
    assert re.match(CONFIG_PATTERN, path)


@pytest.mark.parametrize("path", ["/etc/a.yaml", "../a.yaml", "configs/../../a.yaml", "configs/a.json", "a b.yaml"])
def test_other_paths_are_refused(path: str) -> None:
    assert not re.match(CONFIG_PATTERN, path)


def test_a_wrong_parameter_says_what_is_allowed() -> None:
    from flows.stages import prepare

    with pytest.raises(UserError, match="did you mean 'cpu'"):
        prepare.validate_parameters({"config": "configs/regulator.yaml", "hardware": "cpuu"})


@pytest.mark.parametrize(
    "path", ["{outside}/regulator.yaml", "configs/../../regulator.yaml", "configs/regulator.yaml\n"]
)
def test_a_worker_reads_no_config_outside_the_project(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str
) -> None:
    """A form's validation can be switched off; the command line may name any file."""
    from flows.stages import prepare

    shutil.copy(ROOT / "configs/regulator.yaml", tmp_path)
    monkeypatch.chdir(ROOT)
    path = path.format(outside=tmp_path)
    if path.startswith("/"):
        assert prepare.validate_parameters({"config": path})
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "6a4c1d9c-3c6e-4a4b-9a53-0d4f5ad0b8a1")
    with pytest.raises(UserError, match=r"a YAML file below the project"):
        prepare.validate_parameters({"config": path})
    assert prepare.validate_parameters({"config": "configs/regulator.yaml"})


def test_deploying_nowhere_says_where_to(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from flows import deploy

    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    assert deploy.main() == 2
    assert "make serve" in capsys.readouterr().err


def test_only_runs_of_our_own_workers_are_marked_lost(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On loopback over a database of our own; one that was named may hold the living runs of other machines."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    for name in ("PREFECT_API_URL", "STEEP_FILES_URL"):
        monkeypatch.setenv(name, "")  # set by what follows; put back at the end
    started: list[list[str]] = []
    monkeypatch.setattr(Service, "start", lambda _service: None)
    monkeypatch.setattr(Service, "wait_until", lambda *_: None)
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: started.append(command) or subprocess.CompletedProcess([], 0)
    )
    for host, database, marks in (("127.0.0.1", "", True), ("localhost", "", True), ("0.0.0.0", "", False),
                                  ("127.0.0.1", "postgresql+asyncpg://elsewhere/prefect", False)):  # fmt: skip
        monkeypatch.delenv("PREFECT_API_DATABASE_CONNECTION_URL", raising=False)
        if database:
            monkeypatch.setenv("PREFECT_API_DATABASE_CONNECTION_URL", database)
        serve._start(serve._parse(["--host", host, "--port", str(free_port()), "--database", "sqlite"]), [])
        assert ("--mark-lost" in started.pop()) == marks, (host, database)


@pytest.mark.parametrize("told", [{}, {"PREFECT_SERVER_UI_API_URL": "https://prefect.example.org/api",
                                       "STEEP_FILES_URL": "https://files.example.org"}], ids=["ours", "a proxy's"])  # fmt: skip
def test_browsers_are_told_the_addresses_that_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, told: dict[str, str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(os, "environ", {**os.environ, "PREFECT_HOME": str(tmp_path)} | told)
    for name in {"PREFECT_SERVER_UI_API_URL", "PREFECT_UI_API_URL", "STEEP_FILES_URL", serve.DATABASE} - set(told):
        os.environ.pop(name, None)
    monkeypatch.setattr(Service, "start", lambda _service: None)
    monkeypatch.setattr(Service, "wait_until", lambda *_: None)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0))
    services: list[Service] = []
    port = free_port()
    serve._start(serve._parse(["--port", str(port), "--database", "sqlite"]), services)
    [server] = [service for service in services if service.name == "the server"]
    ours = {
        "PREFECT_SERVER_UI_API_URL": f"http://127.0.0.1:{port}/api",
        "STEEP_FILES_URL": f"http://127.0.0.1:{port + 1}",
    }
    said = os.environ | server.environment
    assert {name: said[name] for name in ours} == ours | told
    assert said["PREFECT_API_URL"] == f"http://127.0.0.1:{port}/api"  # workers need no proxy


def test_runs_that_may_wait_in_another_queue_are_not_expected_to_begin_at_once() -> None:
    """Of Slurm and Kubernetes, whatever way they are set up; nor those that send no heartbeat which would follow."""
    from prefect.client.schemas.objects import WorkPool
    from prefect.client.schemas.responses import DeploymentResponse

    from flows import automations

    ours = {"env": {automations.HEARTBEAT: "30"}}
    templates: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
        "fresh": ("process", {}, ours),
        "plain": ("process", {"job_configuration": {"command": "{{ command }}"},
                              "variables": {"properties": {"command": {"default": None}}}}, ours),
        "kubernetes": ("kubernetes", {}, ours),
        "srun": ("process", {"job_configuration": {"command": "srun python -m prefect.engine"}}, ours),
        "srun by default": ("process", {"variables": {"properties": {"command": {"default": "srun python"}}}}, ours),
        "srun of a deployment": ("process", {}, ours | {"command": "srun python -m prefect.engine"}),
        "of somebody else": ("process", {}, {}),
    }  # fmt: skip
    pools = [WorkPool(name=name, type=kind, base_job_template=template, default_queue_id=uuid4())
             for name, (kind, template, _) in templates.items()]  # fmt: skip
    deployments = [DeploymentResponse(name="cpu", flow_id=uuid4(), id=uuid4(), work_pool_name=name, job_variables=job)
                   for name, (_, _, job) in templates.items()]  # fmt: skip
    watched = automations.begin_at_once(pools, deployments)
    names = {f"prefect.deployment.{deployment.id}": deployment.work_pool_name for deployment in deployments}
    assert [names[resource] for resource in watched] == ["fresh", "plain"]


def test_an_ipv6_address_is_refused_with_what_to_do() -> None:
    with pytest.raises(UserError, match=r"'::1' is an IPv6 address"):
        serve._check_address("::1", 4200)


def test_what_dies_is_started_again_with_a_pause(tmp_path: Path) -> None:
    service = Service("a sleeper", ["sleep", "60"], tmp_path / "log")
    said: list[str] = []
    service.start()
    try:
        assert service.process is not None and service.runs
        first = service.process.pid
        service.process.terminate()
        service.process.wait(30)
        revive([service], said.append)
        assert service.runs and service.process.pid != first
        assert "a sleeper ended" in said[0]
        service.process.terminate()
        service.process.wait(30)
        revive([service], said.append)
        assert not service.runs and len(said) == 1  # not at once again
    finally:
        service.stop()


def test_a_service_that_fails_for_ever_is_tried_for_ever(tmp_path: Path) -> None:
    service = Service("a stubborn one", ["true"], tmp_path / "a file/log", failures=5000)
    (tmp_path / "a file").touch()  # where its folder of logs should be: it cannot be started
    said: list[str] = []
    service.started_at = time.monotonic()
    revive([service], said.append)
    assert service.failures == 5001 and 50 < service.again_at - time.monotonic() <= LONGEST_PAUSE_SECONDS
    assert "could not be started" in said[1] and "in 60 s" in said[1]


def serve_in_vain(home: Path, database: str, **environment: str) -> str:
    """What `make serve` says when it ends at its start, which takes one message and no traceback."""
    command = [sys.executable, "-m", "flows.serve", "--database", database, "--port", str(free_port())]
    environment = os.environ | {"PREFECT_HOME": str(home)} | environment
    environment.pop(serve.DATABASE, None)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    return done.stderr


def test_a_log_that_cannot_be_written_is_one_message_at_the_start(tmp_path: Path) -> None:
    """Later the others live on without the one; at the start nothing is there yet."""
    (tmp_path / "logs").touch()  # a file where the folder of logs has to be
    said = serve_in_vain(tmp_path, "sqlite")
    assert "error: the server cannot be started: File exists" in said
    assert f"where: {tmp_path}/logs" in said and "`make serve` again" in said


def test_a_program_that_is_missing_is_one_message_at_the_start(tmp_path: Path) -> None:
    """Root lacks setpriv on this path, anybody else what initdb runs on."""
    for name in ("initdb", "postgres"):
        (tmp_path / name).write_text("#!/no/such/program")
        (tmp_path / name).chmod(0o755)
    said = serve_in_vain(tmp_path / "home", "postgres", PATH=str(tmp_path))
    assert "error: PostgreSQL cannot be started: No such file or directory" in said
    assert "where: setpriv" in said or f"where: {tmp_path}/initdb" in said


@pytest.mark.parametrize("what", ["missing", "no program"])
def test_a_service_whose_program_does_not_run_says_so_in_a_line(tmp_path: Path, what: str) -> None:
    program = tmp_path / "postgres"
    if what == "no program":
        program.write_text("data")
    service = Service("PostgreSQL", [str(program)], tmp_path / "log")
    with first_start(service.name):
        service.start()
    with pytest.raises(UserError) as caught:
        service.wait_until(lambda: False, 60)
    reason = "No such file or directory" if what == "missing" else "Permission denied"
    assert f"{program} cannot be started: {reason}" in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_a_long_life_is_no_failure(tmp_path: Path) -> None:
    service = Service("an old one", ["true"], tmp_path / "log", failures=9)
    service.started_at = time.monotonic() - LONG_LIFE_SECONDS - 1
    revive([service], lambda _line: None)
    service.stop()
    assert service.failures == 1 and service.again_at - time.monotonic() <= 1


def test_a_service_stops_no_sooner_than_its_run_has_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STEEP_GRACE_SECONDS", raising=False)
    assert seconds_to_stop() == 27
    monkeypatch.setenv("STEEP_GRACE_SECONDS", "300")
    assert seconds_to_stop() == 315


def test_whoever_stops_a_worker_on_the_pages_waits_longer_than_a_checkpoint_takes() -> None:
    page = (ROOT / "flows/README.md").read_text() + (ROOT / "README.md").read_text()
    worker = units()[1]
    [saving] = map(int, re.findall(r"STEEP_GRACE_SECONDS=(\d+)", worker))
    [guard], [systemd] = re.findall(r"--grace (\d+)", worker), re.findall(r"TimeoutStopSec=(\d+)", worker)
    assert saving + 15 <= int(guard) < int(systemd)
    [slurm], [before] = re.findall(r"export STEEP_GRACE_SECONDS=(\d+)", page), re.findall(r"TERM@(\d+)", page)
    assert int(slurm) + 15 <= int(before)
    pods = re.findall(r"terminationGracePeriodSeconds: (\d+)", page)
    assert len(pods) == 2 and all(int(pod) >= 120 + 15 for pod in pods)  # their STEEP_GRACE_SECONDS is 120


def units() -> list[str]:
    """The systemd units of the operations page."""
    found = re.findall(r"(?m)^    \[Unit\]\n(?:^    .*\n)+", (ROOT / "flows/README.md").read_text())
    return [re.sub(r"(?m)^    ", "", unit) for unit in found]


@pytest.mark.parametrize("number", [0, 1])
def test_the_systemd_units_of_the_page_are_sound(tmp_path: Path, number: int) -> None:
    unit = units()[number]
    lines = [line for line in unit.splitlines() if not line.startswith("#")]
    assert len(lines) > 8 and not [
        line for line in lines if "#" in line
    ]  # systemd takes a comment behind a value as part of it
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed here")
    path = tmp_path / f"steep-{number}.service"
    path.write_text(
        unit.replace("/opt/steep/.venv/bin/prefect", sys.executable).replace(
            "/opt/steep/.venv/bin/python", sys.executable
        )
    )
    done = subprocess.run(["systemd-analyze", "verify", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and path.name not in done.stderr, done.stderr
