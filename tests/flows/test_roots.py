"""What a run's file and a model's files name does not lead out of where it belongs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from flows.pipeline import load_plan
from tasks.config import load_config
from tasks.errors import UserError
from tests.conftest import edit


@pytest.mark.parametrize("name", ["../elsewhere", "/tmp/elsewhere", "a/b", ".hidden"])
def test_names_hold_no_path(project: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"elsewhere|a/b|hidden"):
        load_config(edit(project, "name: tiny", f'name: "{name}"'))


def test_a_sources_name_holds_no_path(project: Path) -> None:
    text = (project / "run.yaml").read_text()
    (project / "run.yaml").write_text(text.replace("laws:", "../laws:"))
    with pytest.raises(UserError, match=r"\.\./laws"):
        load_config(project / "run.yaml")


def test_weights_lie_in_the_models_folder(project: Path, tiny_base: Path) -> None:
    (project / "base").unlink()
    shutil.copytree(tiny_base, project / "base")
    index = {"metadata": {}, "weight_map": {"a": "model.safetensors", "b": "../other/model.safetensors"}}
    (project / "base/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"outside its folder: ../other/model.safetensors"):
        load_plan(str(project / "run.yaml"), None)
    index["weight_map"] = {"a": "model.safetensors"}
    (project / "base/model.safetensors.index.json").write_text(json.dumps(index))
    assert load_plan(str(project / "run.yaml"), None)
