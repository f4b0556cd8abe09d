"""What is reused, what runs again, and the reasons that the plan gives."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from flows.pipeline import load_plan, main
from tasks.config import load_config, load_hardware
from tasks.errors import UserError
from tasks.plan import (
    GROUPS,
    PRIMARY_OUTPUT,
    Planned,
    check_upstream,
    make_plan,
    output_digest,
    render,
    select,
    upstream,
)
from tasks.preparation.__main__ import in_config
from tasks.stage import finish, leave_error, write_order
from tests.conftest import edit, laws, write_lines

STAGES = ["prepare_cpt", "prepare_sft", "cpt", "sft", "evaluate_base", "evaluate_cpt", "evaluate_sft", "report"]


def plan(project: Path, tag: str = "cpu") -> dict[str, Planned]:
    config = project / "run.yaml"
    return make_plan(load_config(config), config, tag, load_hardware(tag))


def pretend(planned: Planned, content: str = "") -> None:
    """Finish a stage without its worker: the plan looks at orders, artifacts and digests only."""
    order, runs = planned.order, planned.directory.parent
    digests = {name: output_digest(path) for name, path in upstream(order, runs).items()}
    directory = write_order(replace(order, how={**order.how, "input_digests": digests}), runs)
    output = directory / PRIMARY_OUTPUT[order.kind].replace("model/", "model/weights")
    output.parent.mkdir(exist_ok=True)
    output.write_text(f"{order.stage} {order.key} {content}")
    finish(directory, [str(output.relative_to(directory))], {"rows": 64, "tokens": 4096}, 0.0)


@pytest.fixture
def finished(project: Path) -> Path:
    for planned in plan(project).values():
        pretend(planned)
    assert all(planned.reused for planned in plan(project).values())
    return project


def stale(project: Path, tag: str = "cpu") -> dict[str, str]:
    return {name: "; ".join(planned.reasons) for name, planned in plan(project, tag).items() if not planned.reused}


def test_a_fresh_run_computes_every_stage_data_first(project: Path) -> None:
    assert list(stale(project)) == STAGES
    assert set(stale(project).values()) == {"not yet run"}


def test_a_learning_rate_re_runs_its_stage_and_what_follows(finished: Path) -> None:
    edit(finished, "learning_rate: 1.0e-3\n  batch_tokens: 512\nsft", "learning_rate: 2.0e-3\n  batch_tokens: 512\nsft")
    found = stale(finished)
    assert list(found) == ["cpt", "sft", "evaluate_cpt", "evaluate_sft", "report"]
    assert found["cpt"] == "learning_rate 0.001 -> 0.002"
    assert found["sft"] == "init changed"
    [line] = [line for line in render(plan(finished)).splitlines() if " cpt-" in line]
    assert line.startswith("stale") and line.endswith("learning_rate 0.001 -> 0.002")


def test_another_start_is_told_in_a_word(finished: Path) -> None:
    config = finished / "run.yaml"
    text = config.read_text()
    start, end = text.index("cpt:"), text.index("sft:")
    config.write_text(text[:start] + text[end:])  # SFT from the base
    assert stale(finished)["sft"] == 'init "cpt" -> "the base model"'


def test_reasons_come_from_the_nearest_order_of_the_same_run(finished: Path) -> None:
    config = finished / "run.yaml"
    first = config.read_text()
    edit(finished, "tokens: 4096", "tokens: 2048")
    edit(finished, "general: 0.25", "general: 0.5")
    pretend(plan(finished)["prepare_cpt"])  # newer than the first, and farther from what follows
    config.write_text(first.replace("tokens: 4096", "tokens: 3072"))
    assert stale(finished)["prepare_cpt"] == "tokens 4096 -> 3072"


def test_a_run_by_another_name_is_not_yet_run(finished: Path) -> None:
    edit(finished, "name: tiny", "name: other")
    assert stale(finished) == {}  # the same orders under another name: they stand
    edit(finished, "tokens: 4096", "tokens: 2048")
    assert stale(finished)["prepare_cpt"] == stale(finished)["cpt"] == "not yet run"


def test_the_hardware_tag_re_runs_nothing(finished: Path) -> None:
    assert stale(finished, "cpu-x2") == {}


def test_the_cadence_of_checkpoints_re_runs_nothing(finished: Path) -> None:
    edit(finished, "\nsft:", "\n  checkpoint: {every_steps: 1}\nsft:")
    assert stale(finished) == {}


def test_a_new_file_in_a_source_re_runs_what_reads_it(finished: Path) -> None:
    write_lines(finished / "laws-2.jsonl", laws(3, first=500))
    found = stale(finished)
    assert "prepare_sft" not in found and "evaluate_base" not in found
    assert "laws-2.jsonl is new" in found["prepare_cpt"]


def test_a_changed_file_is_named(finished: Path) -> None:
    write_lines(finished / "chats.jsonl", [{"prompt": "a?", "completion": "b"}])
    found = stale(finished)
    assert "chats.jsonl changed" in found["prepare_sft"]
    assert "prepare_cpt" not in found and "cpt" not in found


def test_a_changed_task_re_runs_the_evaluations_only(finished: Path) -> None:
    write_lines(finished / "heldout.jsonl", laws(6, first=900))
    assert list(stale(finished)) == ["evaluate_base", "evaluate_cpt", "evaluate_sft", "report"]


def test_a_file_that_is_there_and_read_no_more_is_not_called_gone(finished: Path) -> None:
    edit(finished, "laws*.jsonl", "laws.jsonl.gz")
    (finished / "laws.jsonl.gz").write_bytes(gzip.compress((finished / "laws.jsonl").read_bytes()))
    assert "laws.jsonl is no longer read" in stale(finished)["prepare_cpt"]
    (finished / "laws.jsonl").unlink()
    assert "laws.jsonl is gone" in stale(finished)["prepare_cpt"]


def test_a_lost_output_is_computed_again(finished: Path) -> None:
    (plan(finished)["cpt"].directory / "model" / "weights").unlink()
    assert stale(finished)["cpt"] == "model/weights is missing"


def test_another_result_of_the_same_order_makes_what_read_it_stale(finished: Path) -> None:
    pretend(plan(finished)["cpt"], content="a GPU's other bits")
    found = stale(finished)
    assert "computed again with another result" in found["sft"]
    assert "prepare_sft" not in found and "evaluate_base" not in found


def test_a_stage_deleted_from_disk_runs_again_with_what_follows(finished: Path) -> None:
    import shutil

    shutil.rmtree(plan(finished)["prepare_cpt"].directory)
    found = stale(finished)
    assert found["prepare_cpt"] == "not yet run"
    assert found["cpt"] == "prepare_cpt runs again"


def test_what_reads_a_stage_that_is_not_there_is_refused_as_a_whole(finished: Path) -> None:
    edit(finished, "epochs: 1", "epochs: 2")  # SFT and what follows are new; base and CPT stand
    everything = plan(finished)
    for group in GROUPS[:2]:
        check_upstream(everything, select(everything, group, None))
    check_upstream(everything, select(everything, None, None))
    with pytest.raises(UserError, match=r"evaluate_sft reads sft-\w+, which (.|\n)*--until evaluate"):
        check_upstream(everything, select(everything, "evaluate", None))
    with pytest.raises(UserError, match=r"sft reads prepare_sft-"):
        check_upstream(everything, ["sft"])


def test_a_stage_that_failed_says_why(project: Path) -> None:
    order = plan(project)["prepare_cpt"].order
    error = UserError("the file holds no text\nat all", where="laws.jsonl:3")
    leave_error(write_order(order, project / "runs"), error)
    assert stale(project)["prepare_cpt"] == "failed: the file holds no text"
    assert render(plan(project)).startswith("run    prepare_cpt-")
    pretend(plan(project)["prepare_cpt"])
    assert "prepare_cpt" not in stale(project)


def test_only_and_until_choose_stages(project: Path) -> None:
    everything = plan(project)
    assert select(everything, None, None) == STAGES
    assert select(everything, "cpt", None) == ["cpt"]
    assert select(everything, None, "cpt") == ["prepare_cpt", "prepare_sft", "cpt"]
    assert select(everything, "evaluate", None) == ["evaluate_base", "evaluate_cpt", "evaluate_sft"]
    with pytest.raises(UserError, match="'only' is one stage, 'until' everything up to one"):  # a form cannot refuse it
        select(everything, "cpt", "sft")


def test_the_plan_shows_the_stages_that_the_same_options_run(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(*options: str) -> dict[str, str]:
        assert main(["--config", str(finished / "run.yaml"), "--plan", *options]) == 0
        table = capsys.readouterr().out.partition("\n\n")[0].splitlines()
        return {line.split()[1].partition("-")[0]: " ".join([line.split()[0], *line.split()[2:]]) for line in table}

    assert shown() == dict.fromkeys(STAGES, "reuse")
    assert shown("--only", "cpt") == {"cpt": "reuse"}
    assert list(shown("--until", "cpt")) == ["prepare_cpt", "prepare_sft", "cpt"]
    assert shown("--force", "sft") == dict.fromkeys(STAGES, "reuse") | {
        "sft": "stale forced", "evaluate_sft": "stale sft runs again",
        "report": "stale sft runs again; evaluate_sft runs again",
    }  # fmt: skip
    assert shown("--only", "sft", "--force", "prepare") == {"sft": "reuse"}  # the run forces selected stages only


def test_the_plan_says_what_a_training_that_stands_would_take(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(finished / "run.yaml"), "--plan", "--hardware", "cpu"]) == 0
    assert "cpt    stands; again on cpu: " in capsys.readouterr().out


# --- what a config refers to ----------------------------------------------------------------------------------------

MISSING = {
    "no such file": (
        "general.jsonl",
        "genral.jsonl",
        ["source 'general'", "does not exist", "did you mean", "run.yaml:8"],
    ),
    "folder": ("laws*.jsonl", "lm_eval", ["lm_eval is a folder", "lm_eval/**/*", "run.yaml:7"]),
    "files that nobody reads": (
        "general.jsonl",
        "base/*",
        ["source 'general'", "base/model.safetensors", "2 of 6 files", ".jsonl", "narrow the glob", "run.yaml:8"],
    ),
    "empty glob": ("laws*.jsonl", "lows*.jsonl", ["source 'laws'", "matches no file", "run.yaml:7"]),
    "seq_len beyond positions": (
        "seq_len: 64",
        "seq_len: 256",
        ["256", "beyond the model's 128 positions", "run.yaml:5"],
    ),
    "no model": ("/base,", "/bose,", ["is no folder", "run.yaml:5", "hub: true"]),
    "no template file": ("seq_len: 64", "seq_len: 64, chat_template: none.jinja", ["none.jinja", "chat_template"]),
    "no task folder": ("/lm_eval", "/lm_ovel", ["no such folder", "evaluate.include_path"]),
}


@pytest.mark.parametrize("case", MISSING)
def test_what_a_config_names_must_exist(project: Path, case: str) -> None:
    before, after, said = MISSING[case]
    edit(project, before, after)
    with pytest.raises(UserError) as caught:
        plan(project)
    assert [text for text in said if text not in str(caught.value)] == [], str(caught.value)
    assert not (project / "runs").exists() or not list((project / "runs").glob("*-*"))


def test_an_error_of_the_preparation_names_the_line_of_the_runs_file(project: Path) -> None:
    order = plan(project)["prepare_cpt"].order
    file = project / "run.yaml"
    assert in_config("replay.general", order) == f"{file}:13, key cpt.replay.general"
    assert in_config("sources.laws.files", order) == f"{file}:7, key sources.laws.files"
    assert in_config("sources.laws (a.jsonl)", order) == f"{file}:7, key sources.laws (a.jsonl)"
    assert in_config(f"{project}/laws.jsonl:3", order) == f"{project}/laws.jsonl:3"
    file.unlink()
    assert in_config("replay.general", order) == "cpt.replay.general"


def test_an_unknown_tag_is_told_where_it_stands(project: Path) -> None:
    edit(project, "hardware: cpu", "hardware: cpx")
    with pytest.raises(UserError, match="unknown hardware tag 'cpx'") as caught:
        load_plan(str(project / "run.yaml"), None)
    assert caught.value.where == f"{project}/run.yaml:2, key hardware"


def test_pickled_weights_are_refused(project: Path) -> None:
    (project / "base/model.safetensors").rename(project / "base/pytorch_model.bin")
    with pytest.raises(UserError, match=r"only pickled weights \(pytorch_model.bin\)"):
        plan(project)


DAMAGED = {  # file -> its content, what is said
    "config cut short": ("config.json", b"{", ["config.json is damaged, or no JSON"]),
    "config empty": ("config.json", b"", ["config.json is damaged, or no JSON"]),
    "config a list": ("config.json", b"[]", ["config.json holds no fields, but []"]),
    "config without vocabulary": ("config.json", b'{"model_type": "llama"}', ["config.json gives vocab_size None"]),
    "tokenizer's config cut short": ("tokenizer_config.json", b'{"a":', ["tokenizer_config.json is damaged"]),
    "no text at all": ("tokenizer_config.json", b"\xff\xfe", ["tokenizer_config.json is damaged"]),
    "adapter's config cut short": ("adapter_config.json", b"{", ["adapter_config.json is damaged"]),
    "index cut short": ("model.safetensors.index.json", b"{", ["index.json is damaged"]),
    "index without files": ("model.safetensors.index.json", b'{"weight_map": ["a"]}', ["has no `weight_map`"]),
    "weights empty": ("model.safetensors", b"", ["model.safetensors is cut short"]),
    "weights without places": ("model.safetensors", b"\7\0\0\0\0\0\0\0{\"a\":1}", ["is cut short, or no safetensors"]),
    "weights a page": ("model.safetensors", b"<html>Not Found</html>", ["is no safetensors file"]),
    "a git-lfs pointer": ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
                          ["is a git-lfs pointer", "git lfs pull"]),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_of_the_model_is_told_by_its_name(project: Path, case: str) -> None:
    name, content, said = DAMAGED[case]
    (project / "base" / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        plan(project)
    assert [text for text in [*said, "run.yaml:5"] if text not in str(caught.value)] == [], str(caught.value)


def test_weights_that_are_cut_short_are_told_before_the_training(project: Path) -> None:
    weights = project / "base/model.safetensors"
    with weights.open("rb+") as file:
        file.truncate(weights.stat().st_size - 1)
    with pytest.raises(UserError, match=r"model.safetensors holds [\d,]+ bytes, and by its header "):
        plan(project)


def test_a_shard_that_is_missing_is_told_before_the_training(project: Path) -> None:
    (project / "base/model.safetensors").rename(project / "base/model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match=r"lacks model.safetensors\n"):
        plan(project)
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (project / "base/model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(UserError, match=r"lacks model-00002-of-00002.safetensors\n"):
        plan(project)


def test_a_model_without_a_tokenizer_is_refused(project: Path) -> None:
    (project / "base/tokenizer.json").unlink()
    with pytest.raises(UserError, match="holds no tokenizer"):
        plan(project)


def test_lm_evals_functions_are_no_obstacle_to_reading_its_tasks(project: Path) -> None:
    task = project / "lm_eval" / "tiny_bpb.yaml"
    task.write_text(task.read_text() + "process_results: !function utils.f\n")
    (project / "lm_eval" / "utils.py").write_text("f = None\n")
    files = plan(project)["evaluate_base"].order.what["files"]
    assert [Path(file["path"]).name for file in files] == ["tiny_bpb.yaml", "utils.py", "heldout.jsonl"]


@pytest.mark.parametrize("said", [{"layer_types": ["linear_attention", "full_attention"]}, {"model_type": "jamba"}])
def test_a_base_whose_layers_mix_documents_is_refused_before_anything_runs(
    project: Path, said: dict[str, object]
) -> None:
    config = project / "base/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | said))
    with pytest.raises(UserError, match=r"documents of a packed row would see each other[^$]*where: .*run\.yaml:5"):
        plan(project)
