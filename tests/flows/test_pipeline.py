"""The whole road, with real workers, real lm-eval and a real Prefect server; only the model and the data are small."""

import contextlib
import csv
import fcntl
import json
import os
import pty
import re
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client

import flows.credentials
import flows.pipeline
from flows.console import CLEAR_LINE
from flows.pipeline import load_plan, main, pipeline
from flows.stages import report as report_flow
from tasks.stage import read_artifact
from tests.conftest import ROOT, edit

AUDIT = ROOT / "tests" / "network_audit"
STAGES = ["prepare_cpt", "prepare_sft", "cpt", "sft", "evaluate", "report"]
LOOKS_WITHOUT_CHANGE = 15


def run(config: Path, **options: Any) -> dict[str, str]:
    """Run the flow; the final state of each of its task runs by name."""
    state = pipeline(str(config), **options, return_state=True)
    state.result()  # raises what the flow raised
    flow_run_id = state.state_details.flow_run_id
    with get_client(sync_client=True) as client:
        from prefect.client.schemas.filters import FlowRunFilter

        of_this_run = FlowRunFilter(id={"any_": [flow_run_id]})
        runs, settled = [], 0
        for _ in range(200):  # tasks and their states travel as events, which the server takes up a moment later
            before, runs = runs, client.read_task_runs(flow_run_filter=of_this_run)
            final = all(task_run.state is not None and task_run.state.is_final() for task_run in runs)
            settled = settled + 1 if final and len(runs) == len(before) else 0
            if settled == LOOKS_WITHOUT_CHANGE:
                break
            time.sleep(0.1)
    return {task_run.name: task_run.state.name for task_run in sorted(runs, key=lambda r: r.start_time)}


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A project that has been run once, under an audit of every attempt to leave the machine."""
    import tests.conftest as shared

    project = shared.project.__wrapped__(tmp_path_factory.mktemp("road"), tiny_base)  # the fixture, module-wide
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("STEEP_NETWORK_AUDIT", str(project / "network.txt"))
        environment.setenv("PYTHONPATH", str(AUDIT))  # the workers, and theirs
        sys.addaudithook(runpy.run_path(str(AUDIT / "sitecustomize.py"))["note"])  # this process
        assert run(project / "run.yaml") == dict.fromkeys(STAGES, "Completed")
        probe = "import socket; s = socket.socket(); s.settimeout(0.01); s.connect_ex(('192.0.2.1', 9))"
        subprocess.run(
            [sys.executable, "-c", probe], check=True
        )  # the audit sees what it should: a documentation address
    return project


def test_no_process_of_a_run_reaches_for_the_network(road: Path) -> None:
    attempts = (road / "network.txt").read_text().splitlines()
    assert [line for line in attempts if "192.0.2.1" not in line] == []
    assert len(attempts) == 1  # the probe: the audit was on in child processes


def test_the_first_run_leaves_a_model_that_loads_and_a_report(road: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plan = load_plan(str(road / "run.yaml"), "cpu")
    model = AutoModelForCausalLM.from_pretrained(plan["sft"].directory / "model")
    tokenizer = AutoTokenizer.from_pretrained(plan["sft"].directory / "model")
    assert model.get_input_embeddings().num_embeddings >= len(tokenizer)
    assert tokenizer.chat_template and tokenizer.eos_token
    with (plan["report"].directory / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["task", "metric", "base", "cpt", "sft"]
    assert float(rows[0]["cpt"]) < float(rows[0]["base"])  # bits per byte of held-out domain text fell
    page = (plan["report"].directory / "report.html").read_text()
    assert not re.search(r"(src|href)=.?(https?:)?//|@import|url\(.?http", page)  # self-contained


def test_the_ledger_of_both_stages_balances(road: Path) -> None:
    plan = load_plan(str(road / "run.yaml"), "cpu")
    for stage in ("prepare_cpt", "prepare_sft"):
        assert json.loads((plan[stage].directory / "ledger.json").read_text())["balanced"] is True


def test_a_second_run_reuses_everything(road: Path) -> None:
    assert run(road / "run.yaml") == dict.fromkeys(STAGES, "Cached")


def test_a_stage_flow_runs_its_stage_alone(road: Path) -> None:
    state = report_flow(str(road / "run.yaml"), return_state=True)
    assert state.is_completed()


def test_a_changed_learning_rate_runs_what_follows_and_nothing_else(road: Path) -> None:
    edit(
        road,
        "epochs: 1\n  mix:    {chats: 1.0}\n  learning_rate: 1.0e-3",
        "epochs: 1\n  mix:    {chats: 1.0}\n  learning_rate: 2.0e-3",
    )
    states = run(road / "run.yaml", until="sft")
    assert states == {"prepare_cpt": "Cached", "prepare_sft": "Cached", "cpt": "Cached", "sft": "Completed"}


def test_forcing_sets_the_old_stage_aside(road: Path) -> None:
    directory = load_plan(str(road / "run.yaml"), "cpu")["prepare_cpt"].directory
    before = (directory / "rows.arrow").read_bytes()
    assert run(road / "run.yaml", only="prepare", force="prepare") == dict.fromkeys(STAGES[:2], "Completed")
    assert list(directory.parent.glob(f"old.{directory.name}.*"))
    assert (directory / "rows.arrow").read_bytes() == before
    assert run(road / "run.yaml", only="cpt") == {"cpt": "Cached"}  # the same bytes: what follows still stands


def test_a_forced_training_that_was_stopped_goes_on_with_the_same_command(project: Path) -> None:
    edit(project, "batch_tokens: 512\nsft", "batch_tokens: 64\nsft")
    run(project / "run.yaml", until="cpt")
    directory = load_plan(str(project / "run.yaml"), "cpu")["cpt"].directory
    metrics, old = directory / "metrics.jsonl", directory.stat().st_ino
    command = [sys.executable, "-m", "flows.pipeline", "--config", str(project / "run.yaml"), "--force", "cpt"]
    environment = os.environ | {"PREFECT_HOME": str(project / "prefect")}
    with subprocess.Popen([*command, "--only", "cpt"], cwd=ROOT, env=environment) as stopped:
        deadline = time.monotonic() + 240
        while not (directory.is_dir() and directory.stat().st_ino != old and metrics.is_file() and metrics.read_text()):
            assert stopped.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        stopped.terminate()
        assert stopped.wait(60) == -signal.SIGTERM
    assert not (directory / "artifact.json").exists()
    done = subprocess.run([*command, "--only", "cpt"], check=False, cwd=ROOT, env=environment, timeout=240)
    assert done.returncode == 0
    assert read_artifact(directory)["counts"]["resumed_from"]
    assert len(list(directory.parent.glob("old.*"))) == 1


def test_a_stage_without_what_it_reads_says_what_to_run(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(project / "run.yaml"), "--only", "cpt"]) == 2
    assert "cpt reads prepare_cpt-" in (said := capsys.readouterr().err) and "--until cpt" in said


def test_no_evaluation_begins_where_one_has_no_model(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(project / "run.yaml"), "--only", "evaluate"]) == 2
    assert "evaluate_cpt reads cpt-" in capsys.readouterr().err
    assert not list((project / "runs").glob("evaluate_*"))


BAD_ROWS = {
    "malformed JSON": ('{"text": "a law"\n', ["laws.jsonl:201"]),
    "missing field": ('{"txt": "a law"}\n', ["laws.jsonl:201", "text"]),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_one_screen_and_leaves_no_stage(project: Path, case: str) -> None:
    line, said = BAD_ROWS[case]
    with (project / "laws.jsonl").open("a") as file:
        file.write(line)
    command = [sys.executable, "-m", "flows.pipeline", "--config", str(project / "run.yaml")]
    environment = os.environ | {"PREFECT_HOME": str(project / "prefect")}
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=240)
    assert done.returncode == 2, done.stderr
    assert [text for text in said if text not in done.stderr] == [], done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert len((done.stdout + done.stderr).splitlines()) < 24
    [directory] = (project / "runs").glob("prepare_cpt-*")
    assert {path.name for path in directory.iterdir()} <= {"order.json", "worker.log", "error.txt"}


def test_a_bad_config_starts_no_server(project: Path) -> None:
    edit(project, "tokens: 4096", "tokens: -1")
    command = [sys.executable, "-m", "flows.pipeline", "--config", str(project / "run.yaml")]
    environment = os.environ | {"PREFECT_HOME": str(project / "prefect")}
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)
    assert done.returncode == 2 and "cpt.tokens" in done.stderr
    assert not (project / "prefect" / "prefect.db").exists() and not (project / "runs").exists()


def test_secrets_are_there_before_the_plan_asks_the_hub(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []
    make = flows.pipeline.load_plan
    monkeypatch.setenv("STEEP_SECRET_BLOCKS", "STEEP_TEST_TOKEN=hub")
    monkeypatch.setenv("STEEP_TEST_TOKEN", "")  # so that it is taken back at the end
    monkeypatch.delenv("STEEP_TEST_TOKEN")
    monkeypatch.setattr(flows.credentials, "_value", lambda _name, block: {"hub": "a token"}[block])
    monkeypatch.setattr(
        flows.pipeline, "load_plan", lambda *asked: (seen.append(os.environ.get("STEEP_TEST_TOKEN")), make(*asked))[1]
    )
    assert main(["--config", str(project / "run.yaml"), "--plan"]) == 0
    assert seen == ["a token"]


def test_the_tag_cpu_x2_trains_two_sharded_processes(project: Path) -> None:
    states = run(project / "run.yaml", hardware="cpu-x2", until="cpt")
    assert states == dict.fromkeys(["prepare_cpt", "prepare_sft", "cpt"], "Completed")
    artifact = read_artifact(load_plan(str(project / "run.yaml"), "cpu")["cpt"].directory)
    assert artifact["counts"]["wrapper"] == "FSDP2" and artifact["how"]["processes"] == 2


def test_a_source_that_no_stage_reads_is_told(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(project / "run.yaml"), "--plan"]) == 0
    assert "no stage reads" not in capsys.readouterr().out
    edit(project, "  chats: ", "  spare: {files: nowhere.md, text: text}\n  chats: ")
    assert main(["--config", str(project / "run.yaml"), "--plan"]) == 0
    assert "no stage reads spare" in capsys.readouterr().out


def test_the_plan_counts_steps_and_warns_of_few(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(project / "run.yaml"), "--plan"]) == 0
    out = capsys.readouterr().out
    assert (
        "; at least 8 steps; " in out and out.count("so few steps hardly train") == 1
    )  # SFT's are known with its rows
    edit(project, "tokens: 4096", "tokens: 10_000")
    assert main(["--config", str(project / "run.yaml"), "--plan", "--hardware", "1xh200"]) == 0
    out = capsys.readouterr().out
    assert "; at least 20 steps; " in out and "so few steps" not in out


UNREACHABLE = {"offline": {"HF_HUB_OFFLINE": "1"}, "no answer": {"HF_ENDPOINT": "http://127.0.0.1:9"}}


@pytest.mark.parametrize("case", UNREACHABLE)
def test_a_hub_id_that_cannot_be_had_is_told(project: Path, case: str) -> None:
    edit(project, f"{{path: {project}/base,", "{path: nobody/nothing, hub: true,")
    command = [sys.executable, "-m", "flows.pipeline", "--config", str(project / "run.yaml"), "--plan"]
    environment = os.environ | {"HF_HOME": str(project / "cache")} | UNREACHABLE[case]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "nobody/nothing" in done.stderr and "run.yaml:5" in done.stderr and "give a local folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_hub_model_in_the_cache_needs_no_network(project: Path) -> None:
    commit, cache = "0123456789abcdef0123456789abcdef01234567", project / "cache" / "hub" / "models--nobody--nothing"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    shutil.copytree(project / "base", cache / "snapshots" / commit)
    edit(project, f"{{path: {project}/base,", "{path: nobody/nothing, hub: true,")
    command = [sys.executable, "-m", "flows.pipeline", "--config", str(project / "run.yaml"), "--plan"]
    environment = os.environ | {"HF_HOME": str(project / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "evaluate_base-" in done.stdout


def test_on_a_terminal_progress_is_one_line_that_moves(project: Path, tmp_path: Path) -> None:
    """On a real one, 100 columns wide: what is printed there is kept as a screen would keep it."""
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    command = [sys.executable, "-m", "flows.pipeline", "--config", str(project / "run.yaml"), "--until", "cpt"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    environment |= {"PREFECT_HOME": str(tmp_path / "prefect"), "TERM": "xterm"}
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, cwd=ROOT, env=environment)
    os.close(terminal)
    said = b""
    with contextlib.suppress(OSError):  # EIO: nobody holds the other end any more
        while more := os.read(master, 65536):
            said += more
    os.close(master)
    assert process.wait(60) == 0, said.decode(errors="replace")[-2000:]
    text = said.decode(errors="replace")
    moving = [part for part in text.split(CLEAR_LINE) if "[==" in part or "[>" in part]
    assert any(part.startswith("cpt") for part in moving), text[-2000:]
    assert all("\n" not in part.rstrip() and len(part) < 100 for part in moving), (
        "none of them is left behind, or wraps"
    )
    assert re.search(r"cpt +step (\d+)/\1 +100%", text), text[-2000:]
