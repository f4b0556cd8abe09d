"""What a run's file and a model's files name does not lead out of where it belongs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flows.pipeline import load_plan
from tasks.config import load_config
from tasks.errors import UserError
from tests.conftest import ROOT, edit

PATHS = {  # (text in the config, its replacement, file:line and key of the message)
    "runs_dir": ("runs_dir: {inside}/runs", "runs_dir: {outside}/runs", "run.yaml:4, key runs_dir"),
    "model": ("path: {inside}/base", "path: {outside}/base", "run.yaml:5, key model.path"),
    "template": (
        "seq_len: 64",
        "seq_len: 64, chat_template: {outside}/base/chat_template.jinja",
        "run.yaml:5, key model.chat_template",
    ),
    "source": ("files: {inside}/chats.jsonl", "files: {outside}/chats.jsonl", "run.yaml:9, key sources.chats.files"),
    "glob": ('files: "{inside}/laws*', 'files: "{outside}/laws*', "run.yaml:7, key sources.laws.files"),
    "one of a list": (
        'files: "{inside}/laws*.jsonl"',
        'files: ["{inside}/laws*.jsonl",\n             "{outside}/laws*.jsonl"]',
        "run.yaml:8, key sources.laws.files.1",
    ),
    "include_path": (
        "include_path: {inside}/lm_eval",
        "include_path: {outside}/lm_eval",
        "run.yaml:24, key evaluate.include_path",
    ),
}


@pytest.fixture
def outside(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder below no root that holds all that the project's config names."""
    folder = tmp_path_factory.mktemp("outside") / "data"
    shutil.copytree(project, folder)
    return folder


def refusal(project: Path) -> str:
    with pytest.raises(UserError, match="outside the folders that a run's file may name") as caught:
        load_plan(str(project / "run.yaml"), None)
    return str(caught.value)


@pytest.mark.parametrize("climbing", [False, True], ids=["absolute", "climbing"])
@pytest.mark.parametrize("case", PATHS)
def test_no_path_of_a_config_leaves_its_roots(
    project: Path, outside: Path, case: str, climbing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = os.path.relpath(outside, ROOT) if climbing else str(outside)
    before, after, where = PATHS[case]
    edit(project, before.format(inside=project), after.format(inside=project, outside=named))
    said = refusal(project)
    assert named in said and where in said
    assert f"{ROOT} (the project)" in said and f"{project} (the config's folder)" in said
    assert not list(project.glob("runs/*-*")) and not (outside / "runs").exists()

    monkeypatch.setenv("STEEP_ROOTS", f"/nowhere:{outside}")  # the same config, once the operator allows the folder
    assert load_plan(str(project / "run.yaml"), None)


def test_the_refusal_names_what_to_set(project: Path, outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEEP_ROOTS", "/mnt/others")
    edit(project, f"files: {project}/chats.jsonl", f"files: {outside}/chats.jsonl")
    said = refusal(project)
    assert "/mnt/others (STEEP_ROOTS)" in said
    assert f"set STEEP_ROOTS=/mnt/others:{outside} in the environment" in said


@pytest.mark.parametrize("path", ["/no-such-folder", "/"])
def test_nobody_is_told_to_allow_everything(project: Path, path: str) -> None:
    edit(project, f"runs_dir: {project}/runs", f"runs_dir: {path}")
    advice = refusal(project).split("do: ")[1]
    assert ("STEEP_ROOTS=/no-such-folder in" in advice) if path != "/" else ("STEEP_ROOTS" not in advice)


def test_a_file_beside_the_roots_of_the_machine_is_advised_itself(project: Path) -> None:
    edit(project, f"files: {project}/chats.jsonl", "files: /no-such-file.jsonl")
    assert "STEEP_ROOTS=/no-such-file.jsonl in" in refusal(project)


def test_one_advice_is_enough_for_a_model_of_the_hubs_cache(
    project: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its snapshot is a folder of links to blobs beside it."""
    cache = outside / "models--a--b"
    (cache / "snapshots/c0ffee").mkdir(parents=True)
    (project / "base").rename(cache / "blobs")
    for file in (cache / "blobs").iterdir():
        (cache / "snapshots/c0ffee" / file.name).symlink_to(Path("../../blobs") / file.name)
    edit(project, f"path: {project}/base", f"path: {cache}/snapshots/c0ffee")
    said = refusal(project)
    assert f"STEEP_ROOTS={cache} in" in said
    monkeypatch.setenv("STEEP_ROOTS", str(cache))
    assert load_plan(str(project / "run.yaml"), None)


LINKS = {  # what becomes a link to its copy outside, and the key of the message
    "base": "model.path",
    "base/model.safetensors": "model.path",
    "base/tokenizer.json": "model.path",
    "chats.jsonl": "sources.chats.files",
    "laws.jsonl": "sources.laws.files",
    "lm_eval": "evaluate.include_path",
    "lm_eval/tiny_bpb.yaml": "evaluate.include_path",
    "heldout.jsonl": "lm_eval/tiny_bpb.yaml",
}


@pytest.mark.parametrize("name", LINKS)
def test_a_link_is_judged_by_where_it_leads(project: Path, outside: Path, name: str) -> None:
    (project / name).rename(project / "aside")
    (project / name).symlink_to(outside / name)
    said = refusal(project)
    assert f"{name} leads to {outside / name}, outside" in said and LINKS[name] in said

    (project / name).unlink()  # a link that stays inside is as good as a file
    (project / name).symlink_to(project / "aside")
    assert load_plan(str(project / "run.yaml"), None)


def test_each_file_of_a_glob_is_judged(project: Path, outside: Path) -> None:
    (project / "laws-2.jsonl").symlink_to(outside / "laws.jsonl")
    assert f"laws-2.jsonl leads to {outside}/laws.jsonl" in refusal(project)


def test_a_glob_climbs_not_behind_its_wildcard(project: Path, outside: Path) -> None:
    up = os.path.relpath(outside, project / "lm_eval")
    edit(project, f"files: {project}/chats.jsonl", f"files: {project}/lm_*/{up}/chats.jsonl")
    assert "sources.chats.files" in refusal(project)


READ = [
    "include: {outside}/lm_eval/tiny_bpb.yaml",
    "include: [tiny_bpb.yaml, {outside}/lm_eval/tiny_bpb.yaml]",
    "include: ../more/tiny_bpb.yaml",  # which names data outside
    "dataset_path: {outside}",
    "dataset_path: ~/data",
    "dataset_kwargs: {{data_dir: {outside}}}",
    "dataset_kwargs: {{data_files: ['file://{outside}/heldout.jsonl']}}",
    "dataset_kwargs: {{data_files: 'file:{outside}/heldout.jsonl'}}",
    "dataset_kwargs: {{data_files: ['local:{outside}/heldout.jsonl']}}",
    "dataset_path: 'local://{outside}'",
    "dataset_kwargs: {{data_files: {{test: 'zip://a.jsonl::{outside}/a.zip'}}}}",
    "use_prompt: '{outside}/prompts.yaml:*'",
    "group: inline\ntask: [{{task: a, dataset_path: json, dataset_kwargs: {{data_files: {outside}/heldout.jsonl}}}}]",
    "group: inline\ntask: [tiny_bpb, {{group: b, task: [{{task: a, dataset_path: {outside}}}]}}]",
    "include: ../more/base.inc",
]


@pytest.mark.parametrize("line", READ)
def test_a_task_reads_nothing_outside(project: Path, outside: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a task that the run does not name: a group may."""
    monkeypatch.setenv("HOME", str(outside))
    (project / "more").mkdir()
    text = (project / "lm_eval/tiny_bpb.yaml").read_text()
    (project / "more/tiny_bpb.yaml").write_text(text.replace(str(project), str(outside)))
    inline = f"group: inline\ntask: [{{task: a, dataset_kwargs: {{data_files: {outside}/heldout.jsonl}}}}]\n"
    (project / "more/base.inc").write_text(inline)
    name = "" if line.startswith("group") else "task: other\n"
    (project / "lm_eval/other.yaml").write_text(name + line.format(outside=outside) + "\n")
    where = line.split("/", 1)[1] if "more" in line else "lm_eval/other.yaml"
    assert where in refusal(project).split("where: ")[1]


@pytest.mark.parametrize(
    "line",
    ["dataset_path: owner/name", "dataset_kwargs: {data_files: 'https://a.org/b.jsonl'}", "description: in a circle"],
)
def test_the_hubs_data_is_no_path(project: Path, line: str) -> None:
    (project / "lm_eval/other.yaml").write_text(f"task: other\ninclude: other.yaml\n{line}\n")
    assert load_plan(str(project / "run.yaml"), None)


@pytest.mark.parametrize("revision", ["../../../../secret", "/etc/hostname"])
def test_a_revision_is_no_path(project: Path, revision: str) -> None:
    edit(project, "seq_len: 64", f"seq_len: 64, revision: {revision}")
    with pytest.raises(UserError, match="is no revision"):
        load_config(project / "run.yaml")


def test_a_hub_id_is_no_path(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the working folder this id would be a link that leads outside."""
    monkeypatch.chdir(project)
    (project / "nobody").symlink_to("/etc")
    edit(project, f"path: {project}/base", "path: nobody/base")
    assert "nobody/base leads to /etc/base" in refusal(project)
    edit(project, "path: nobody/base", "path: nobody/base, hub: true")
    assert load_config(project / "run.yaml")


def test_runs_may_be_a_link_of_the_operator(project: Path, outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    edit(project, f"runs_dir: {project}/runs\n", "")
    shutil.copytree(ROOT / "configs", project / "configs")
    (outside / "large").mkdir()
    (project / "runs").symlink_to(outside / "large")
    assert load_plan("run.yaml", None)


@pytest.mark.parametrize("arguments", [["--plan"], ["--only", "prepare"], ["--force", "report"]], ids=" ".join)
def test_the_command_line_refuses_with_one_message(project: Path, outside: Path, arguments: list[str]) -> None:
    edit(project, f"files: {project}/chats.jsonl", f"files: {outside}/chats.jsonl")
    command = [sys.executable, "-m", "flows.pipeline", "--config", str(project / "run.yaml"), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: " in done.stderr and "key sources.chats.files" in done.stderr
    assert not (project / "runs").exists()


@pytest.mark.parametrize("flow", ["pipeline", "prepare", "cpt", "sft", "evaluate", "report"])
def test_a_deployments_run_refuses_too(
    project: Path, outside: Path, flow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a worker starts it: the project is the working folder, the config a path below it."""
    from flows import stages

    shutil.copytree(ROOT / "configs", project / "configs")
    monkeypatch.chdir(project)
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "6a4c1d9c-3c6e-4a4b-9a53-0d4f5ad0b8a1")
    started = getattr(stages, flow)
    assert started.validate_parameters({"config": "run.yaml", "hardware": "cpu"})
    edit(project, f"files: {project}/chats.jsonl", f"files: {outside}/chats.jsonl")
    with pytest.raises(UserError, match=r"key sources\.chats\.files"):
        started.validate_parameters({"config": "run.yaml", "hardware": "cpu"})


def test_a_deployments_config_is_no_link_out_of_the_project(
    project: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.stages import prepare

    monkeypatch.chdir(project)
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "6a4c1d9c-3c6e-4a4b-9a53-0d4f5ad0b8a1")
    (project / "mine").symlink_to(outside)
    with pytest.raises(UserError, match=f"leads to {outside}, outside"):
        prepare.validate_parameters({"config": "mine/run.yaml"})


@pytest.mark.parametrize("name", ["../elsewhere", "/tmp/elsewhere", "a/b", ".hidden"])
def test_names_hold_no_path(project: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"elsewhere|a/b|hidden"):
        load_config(edit(project, "name: tiny", f'name: "{name}"'))


def test_a_sources_name_holds_no_path(project: Path) -> None:
    text = (project / "run.yaml").read_text()
    (project / "run.yaml").write_text(text.replace("laws:", "../laws:"))
    with pytest.raises(UserError, match=r"\.\./laws"):
        load_config(project / "run.yaml")


def test_weights_lie_in_the_models_folder(project: Path) -> None:
    index = {"metadata": {}, "weight_map": {"a": "model.safetensors", "b": "../other/model.safetensors"}}
    (project / "base/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"outside its folder: ../other/model.safetensors"):
        load_plan(str(project / "run.yaml"), None)
    index["weight_map"] = {"a": "model.safetensors"}
    (project / "base/model.safetensors.index.json").write_text(json.dumps(index))
    assert load_plan(str(project / "run.yaml"), None)


def prepare_key(project: Path) -> str:
    return load_plan(str(project / "run.yaml"), None)["prepare_cpt"].order.key


@pytest.mark.parametrize("name", ["../../outside/tokenizer.4.0.0.json", "/outside/tokenizer.4.0.0.json"])
def test_a_tokenizers_files_lie_in_the_models_folder(project: Path, name: str) -> None:
    config = project / "base/tokenizer_config.json"
    text, before = config.read_text(), prepare_key(project)
    plain = json.loads(text)
    config.write_text(json.dumps(plain | {"fast_tokenizer_files": [name]}))
    with pytest.raises(UserError, match=rf"outside its folder: {name}"):
        load_plan(str(project / "run.yaml"), None)

    config.write_text(text)
    assert prepare_key(project) == before
    config.write_text(json.dumps(plain | {"fast_tokenizer_files": ["tokenizer.4.0.0.json"]}))
    shutil.copy(project / "base/tokenizer.json", project / "base/tokenizer.4.0.0.json")
    before = prepare_key(project)
    (project / "base/tokenizer.4.0.0.json").write_text("{}")
    assert prepare_key(project) != before


def test_a_link_deep_in_the_models_folder_is_judged(project: Path, outside: Path) -> None:
    before = prepare_key(project)
    (project / "base/additional_chat_templates").mkdir()
    (project / "base/additional_chat_templates/tools.jinja").write_text("{{ messages }}")
    assert prepare_key(project) != before
    (project / "base/additional_chat_templates/secret.jinja").symlink_to(outside / "chats.jsonl")
    assert f"secret.jinja leads to {outside}/chats.jsonl" in refusal(project)


def test_an_adapter_is_not_loaded_for_its_base(project: Path) -> None:
    (project / "base/adapter_config.json").write_text('{"base_model_name_or_path": "/outside/model"}')
    with pytest.raises(UserError, match="is an adapter of /outside/model"):
        load_plan(str(project / "run.yaml"), None)
