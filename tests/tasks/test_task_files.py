"""The run's own lm-eval tasks as the plan reads them: groups, tags, what is included, and data."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.pipeline import load_plan
from tasks.errors import UserError
from tests.conftest import edit

OTHER = "task: other\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/other.jsonl}}}}\n"


def key(project: Path) -> str:
    return load_plan(str(project / "run.yaml"), None)["evaluate_base"].order.key


def say(project: Path, name: str, text: str) -> None:
    (project / "lm_eval" / name).write_text(text.format(folder=project))


@pytest.fixture
def other(project: Path) -> Path:
    """Data of a second task, which is in nothing that the run names yet."""
    (project / "other.jsonl").write_text('{"text": "one"}\n')
    (project / "folder").mkdir()
    (project / "folder/train.jsonl").write_text('{"text": "one"}\n')
    return project


REACHED = {  # how a run of `all` comes to a file, and which
    "group": ({"a.yaml": "group: all\ntask: [other]\n", "b.yaml": OTHER}, "other.jsonl"),
    "group of groups": (
        {"a.yaml": "group: all\ntask: [{{group: some, task: [mine]}}]\n", "b.yaml": "group: mine\ntask: [other]\n",
         "c.yaml": OTHER}, "other.jsonl",
    ),
    "tag": ({"b.yaml": OTHER + "tag: [all, most]\n"}, "other.jsonl"),
    "tag in a group": ({"a.yaml": "group: all\ntask: [most]\n", "b.yaml": OTHER + "tag: most\n"}, "other.jsonl"),
    "data of an included file": ({"a.yaml": "task: all\ninclude: b.inc\n", "b.inc": OTHER}, "other.jsonl"),
    "included file": ({"a.yaml": "task: all\ninclude: ../base.inc\n"}, "base.inc"),
    "included by a member": ({"a.yaml": "group: all\ntask: [b]\n", "b.yaml": "task: b\ninclude: ../base.inc\n"},
                             "base.inc"),
    "inline task": (
        {"a.yaml": "group: all\ntask:\n- task: new\n  dataset_path: json\n"
         "  dataset_kwargs: {{data_files: {folder}/other.jsonl}}\n"}, "other.jsonl",
    ),
    "data said by the group": (
        {"a.yaml": "group: all\ntask: [{{task: other, dataset_kwargs: {{data_files: {folder}/other.jsonl}}}}]\n",
         "b.yaml": OTHER.replace("other.jsonl", "gone.jsonl")}, "other.jsonl",
    ),
    "folder": ({"a.yaml": "task: all\ndataset_path: {folder}/folder\n"}, "folder/train.jsonl"),
    "glob in a folder": (
        {"a.yaml": 'task: all\ndataset_path: json\ndataset_kwargs: {{data_dir: {folder}/folder, data_files: "*.jsonl"}}\n'},
        "folder/train.jsonl",
    ),
    "address": (
        {"a.yaml": "task: all\ndataset_path: json\ndataset_kwargs: {{data_files: 'file:{folder}/other.jsonl'}}\n"},
        "other.jsonl",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REACHED)
def test_a_changed_file_evaluates_again(other: Path, case: str) -> None:
    files, changed = REACHED[case]
    (other / "base.inc").write_text("output_type: loglikelihood\n")
    for name, text in files.items():
        say(other, name, text)
    edit(other, "domain:  [tiny_bpb]", "domain:  [all]")
    before = key(other)
    assert key(other) == before
    (other / changed).write_text('{"text": "another one"}\n' if changed.endswith("jsonl") else "output_type: other\n")
    assert key(other) != before


def test_what_does_not_run_changes_no_more_than_its_own_file(other: Path) -> None:
    say(other, "b.yaml", OTHER)
    before = key(other)
    (other / "other.jsonl").write_text("")
    assert key(other) == before


BROKEN = {
    "broken": ("task: [a\n", r"not readable as YAML.*\n.*other\.yaml:2"),
    "list": ("- task: other\n", r"holds a list, no `key: value` mapping\n.*other\.yaml"),
    "object": ("task: !!python/name:os.system\n", r"not readable as YAML.*\n.*other\.yaml:1"),
    "encoding": ("task: \xff\n", r"not readable as YAML.*\n.*other\.yaml"),
    "arguments": ("task: tiny\ndataset_kwargs: [1]\n", r"dataset_kwargs is \[1\]\n.*other\.yaml"),
    "member": ("group: tiny\ntask: [[a]]\n", r"has the member \['a'\]\n.*other\.yaml"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_is_no_task_is_named(project: Path, case: str) -> None:
    text, said = BROKEN[case]
    (project / "lm_eval/other.yaml").write_bytes(text.encode("latin-1"))
    if "tiny" in text:
        edit(project, "domain:  [tiny_bpb]", "domain:  [tiny]")
    with pytest.raises(UserError, match=said):
        load_plan(str(project / "run.yaml"), None)


@pytest.mark.parametrize(
    "text",
    ["group: all\ntask: [tiny_bpb]\n", "group: all\ntask: [all]\n", "task: [a, b]\n", "tag: 3\ntask: 4\n", "",
     "task: a\ndataset_kwargs: &x {data_files: [a, *x]}\n", "group: all\ntask: tiny_bpb\n"],
)  # fmt: skip
def test_an_odd_file_breaks_no_plan(project: Path, text: str) -> None:
    (project / "lm_eval/other.yaml").write_text(text)
    assert load_plan(str(project / "run.yaml"), None)
    edit(project, "domain:  [tiny_bpb]", "domain:  [all]")
    assert load_plan(str(project / "run.yaml"), None)


def test_lm_eval_finds_what_the_plan_finds(other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version of lm-eval may read groups otherwise: then this fails, and `Suite` has to follow."""
    from tasks.evaluation.suite import leaves, load_suite
    from tasks.task_files import Suite, _read

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    rest = "test_split: train\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{{{text}}}}'\n"
    rest += "metric_list: [{{metric: bits_per_byte}}]\n"
    rest = [
        "test_split: train",
        "output_type: loglikelihood_rolling",
        "doc_to_text: ''",
        "doc_to_target: '{{{{text}}}}'",
    ]
    rest.append("metric_list: [{{metric: bits_per_byte}}]")
    new = "{{task: new, dataset_path: json, " + ", ".join(rest) + "}}"
    group = "group: all\ndataset_kwargs: {{data_files: {folder}/other.jsonl}}\ntask:\n- other\n"
    say(other, "a.yaml", f"{group}- group: within\n  task: [{new}]\n")
    files = OTHER.replace("{{test: {folder}/other.jsonl}}", "{folder}/gone.jsonl") + "\n".join(rest)
    say(other, "b.yaml", files)
    _, loaded = load_suite(["all"], other / "lm_eval")
    theirs = sorted(str(task.config.dataset_kwargs["data_files"]) for task in leaves(loaded["all"]))
    suite = Suite()
    for file in sorted((other / "lm_eval").glob("*.yaml")):
        suite.add(_read(file, other / "run.yaml", {file}))
    ours = sorted(str(config["dataset_kwargs"]["data_files"]) for _, config in suite.reached("all", {}) if config)
    assert ours == theirs and len(ours) == 2 and Path(ours[0]).name == "other.jsonl"


@pytest.mark.parametrize("first", [".ipynb_checkpoints/b.yaml", "a/b.yaml", "a.yml"])
def test_of_two_tasks_of_a_name_it_is_lm_evals(other: Path, first: str) -> None:
    """lm-eval takes no copy that an editor laid aside, no .yml, and sorts paths as texts."""
    (other / "lm_eval" / first).parent.mkdir(exist_ok=True)
    say(other, first, OTHER.replace("other.jsonl", "heldout.jsonl"))
    (other / "lm_eval/a-b").mkdir()
    say(other, "a-b/b.yaml", OTHER)
    edit(other, "domain:  [tiny_bpb]", "domain:  [other]")
    before = key(other)
    (other / "other.jsonl").write_text('{"text": "another one"}\n')
    assert key(other) != before


CODE = {
    "module": "doc_to_text: !function os.system",
    "file": "doc_to_text: !function /outside/evil.run",
    "dots for slashes": "doc_to_text: !function .outside.evil.run",
    "no name": "doc_to_text: !function scoring",
    "list": "doc_to_text: !function [os.system]",
    "deep": "filter_list: [{name: a, filter: [{function: custom, filter_fn: !function os.system}]}]",
    "metric": "metric_list: [{metric: /outside/evil.py}]",
    "metric's folder": "metric_list: [{metric: somebody/evil}]",
    "metric's file": "metric_list: [{metric: evil.py}]",
}


@pytest.mark.parametrize("case", CODE)
def test_a_task_runs_only_the_code_beside_it(project: Path, case: str) -> None:
    (project / "lm_eval/scoring.py").write_text("")
    (project / "lm_eval/other.yaml").write_text(f"task: other\n{CODE[case]}\n")
    with pytest.raises(
        UserError, match="is a path, and would" if "metric" in case else "names no Python file"
    ) as caught:
        load_plan(str(project / "run.yaml"), None)
    assert caught.value.where.endswith("other.yaml")


def test_code_beside_an_included_file_evaluates_again(other: Path) -> None:
    (other / "more/deep").mkdir(parents=True)
    (other / "more/base.inc").write_text("doc_to_text: !function deep.scoring.ask\n")
    (other / "more/deep/scoring.py").write_text("ask = str\n")
    say(other, "a.yaml", "task: all\ninclude: ../more/base.inc\n")
    edit(other, "domain:  [tiny_bpb]", "domain:  [all]")
    before = key(other)
    (other / "more/deep/scoring.py").write_text("ask = repr\n")
    assert key(other) != before


CARDS = {
    "README.md": "---\nconfigs:\n- config_name: default\n  data_files: {file}\n---\nText.\n",
    ".huggingface.yaml": "configs:\n- config_name: a\n  data_files: [{{split: train, path: ['{file}']}}]\n",
}


@pytest.mark.parametrize("file", ["/outside/x.jsonl", "../x.jsonl", "file:/outside/x.jsonl", "zip://a::/outside/x.zip"])
@pytest.mark.parametrize("card", CARDS)
def test_a_card_names_files_of_its_folder(other: Path, card: str, file: str) -> None:
    say(other, "a.yaml", "task: all\ndataset_path: {folder}/folder\n")
    edit(other, "domain:  [tiny_bpb]", "domain:  [all]")
    (other / "folder" / card).write_text(CARDS[card].format(file="train.jsonl"))
    assert load_plan(str(other / "run.yaml"), None)
    (other / "folder" / card).write_text(CARDS[card].format(file=file))
    with pytest.raises(UserError, match="the card of the data set names") as caught:
        load_plan(str(other / "run.yaml"), None)
    assert caught.value.where.endswith(card)


def test_a_link_in_a_folder_of_data_is_judged(other: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    say(other, "a.yaml", "task: all\ndataset_path: {folder}/folder\n")
    edit(other, "domain:  [tiny_bpb]", "domain:  [all]")
    (other / "folder/more").symlink_to(tmp_path_factory.mktemp("outside"))
    with pytest.raises(UserError, match="outside the folders that a run's file may name"):
        load_plan(str(other / "run.yaml"), None)


@pytest.mark.parametrize("side", ["domain", "general"])
def test_a_name_that_nobody_knows_is_told_by_the_plan(project: Path, side: str) -> None:
    edit(project, "general: []", "general: [arc_easy]")  # lm-eval's own
    assert load_plan(str(project / "run.yaml"), None)
    edit(project, *(("[tiny_bpb]", "[tiny_bbp]") if side == "domain" else ("[arc_easy]", "[arc_easy, arc_esay]")))
    said = r"unknown evaluation task '(tiny_bbp|arc_esay)', did you mean '(tiny_bpb|arc_easy)'"
    with pytest.raises(UserError, match=said) as caught:
        load_plan(str(project / "run.yaml"), None)
    line, text = (22, "evaluate.domain.0") if side == "domain" else (23, "evaluate.general.1")
    assert caught.value.where == f"{project}/run.yaml:{line}, key {text}"


@pytest.mark.parametrize("case", ["group", "tag", "tag in a group"])
def test_a_task_that_two_names_bring_is_refused(other: Path, case: str) -> None:
    for name, text in REACHED[case][0].items():
        say(other, name, text)
    edit(other, "domain:  [tiny_bpb]", "domain:  [all]")
    assert load_plan(str(other / "run.yaml"), None)
    edit(other, "general: []", "general: [tiny_bpb, other]")
    with pytest.raises(UserError, match=r"'all' and 'other' both bring the evaluation task 'other'") as caught:
        load_plan(str(other / "run.yaml"), None)
    assert "evaluate.general" in caught.value.where
