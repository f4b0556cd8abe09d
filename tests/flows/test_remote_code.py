"""A model that brings code of its own: refused unless the config says in words that it may run; then it runs everywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.pipeline import load_plan
from tasks.errors import UserError
from tasks.trust import code_named_by
from tests.conftest import ROOT, edit

CODE = '''
"""A Llama under another name. Whoever imports this leaves a mark."""
import os, sys
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

with Path(os.environ["STEEP_TEST_MARK"]).open("a") as mark:
    mark.write(" ".join(sys.argv) + "\\n")

class OwnConfig(LlamaConfig):
    model_type = "steep_own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
'''


@pytest.fixture
def own(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project, whose base model is of an architecture that only its own code knows."""
    monkeypatch.setenv("STEEP_TEST_MARK", str(project / "mark"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(project / "modules"))  # transformers copies the code there
    (project / "base/own.py").write_text(CODE)
    config = json.loads((project / "base/config.json").read_text())
    config |= {"model_type": "steep_own", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (project / "base/config.json").write_text(json.dumps(config))
    return project


def say(project: Path, answer: str) -> None:
    edit(project, "seq_len: 64}", f"seq_len: 64, trust_remote_code: {answer}}}")


def pipeline(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.pipeline", "--config", str(project / "run.yaml"), *arguments]
    environment = os.environ | {"PREFECT_HOME": str(project / ".prefect")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_it_is_refused_while_the_config_says_nothing(own: Path) -> None:
    assert code_named_by(own / "base") == ["own.OwnConfig", "own.OwnModel"]
    with pytest.raises(UserError, match="brings code of its own") as caught:
        load_plan(str(own / "run.yaml"), None)
    assert "trust_remote_code: true" in caught.value.allowed and "run.yaml:5, key model.path" in caught.value.where
    assert not (own / "mark").exists()


def test_a_model_without_code_needs_no_word(project: Path) -> None:
    assert code_named_by(project / "base") == []
    assert "trust_remote_code" not in load_plan(str(project / "run.yaml"), None)["cpt"].order.how


def test_its_code_is_part_of_the_keys(own: Path) -> None:
    say(own, "true")
    before = load_plan(str(own / "run.yaml"), None)
    assert all(planned.order.how["trust_remote_code"] is True for planned in before.values())
    (own / "base/own.py").write_text(CODE + "\n# changed\n")
    after = load_plan(str(own / "run.yaml"), None)
    changed = {name for name in before if before[name].directory != after[name].directory}
    assert changed == set(before)


@pytest.mark.slow
def test_false_runs_none_of_it(own: Path) -> None:
    say(own, "false")
    done = pipeline(own, "--until", "cpt")
    assert done.returncode == 2, done.stderr
    assert "the model's config does not load" in done.stderr and "trust_remote_code: true" in done.stderr
    assert not (own / "mark").exists()


@pytest.mark.slow
def test_true_runs_it_in_training_and_evaluation_and_the_report_says_so(own: Path) -> None:
    say(own, "true")
    done = pipeline(own)
    assert done.returncode == 0, done.stderr
    marks = (own / "mark").read_text()
    assert "tasks/training" in marks and "tasks/evaluation" in marks
    [model] = own.glob("runs/sft-*/model")
    assert (model / "own.py").is_file()  # it travels with what was trained
    [report] = own.glob("runs/report-*/report.md")
    assert "own (trust_remote_code)" in report.read_text().replace("\\", "")  # Markdown escapes the underscores
