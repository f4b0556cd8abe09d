"""Mistakes in task files: each becomes one error that names the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.errors import UserError
from tests.conftest import write_lines
from tests.evaluation.conftest import write_tasks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Task files that a test may break."""
    write_tasks(tmp_path)
    return tmp_path


def load(folder: Path, *names: str) -> dict:
    from tasks.evaluation.suite import load_suite

    return load_suite(list(names), folder)[1]


def test_own_tasks_are_found_without_indexing_those_of_lm_eval(folder: Path) -> None:
    from tasks.evaluation.suite import find_tasks

    assert set(find_tasks(["choices", "bpb"], folder).task_index) == {"answers", "choices", "bpb"}


@pytest.mark.slow  # 10 s: it indexes all tasks of lm-eval
def test_a_task_of_lm_eval_is_found_beside_own_ones(folder: Path) -> None:
    from tasks.evaluation.suite import find_tasks

    index = find_tasks(["choices", "arc_easy"], folder).task_index
    assert "arc_easy" in index and "choices" in index


def test_a_group_brings_its_tasks(folder: Path) -> None:
    from tasks.evaluation.suite import leaves

    (folder / "group.yaml").write_text("group: all_of_it\ntask: [choices, bpb]\n")
    assert [task.task_name for task in leaves(load(folder, "all_of_it")["all_of_it"])] == ["choices", "bpb"]


@pytest.mark.parametrize("both", ["group: both\ntask: [{group: inner, task: [choices]}, bpb]\n", "a tag"])
def test_a_task_that_two_names_bring_is_refused_before_a_model_is_loaded(folder: Path, both: str) -> None:
    if both == "a tag":
        file = folder / "choices.yaml"
        file.write_text(file.read_text() + "tag: both\n")
    else:
        (folder / "both.yaml").write_text(both)
    assert load(folder, "both", "answers")
    with pytest.raises(UserError, match=r"'both' and 'choices' both bring the evaluation task 'choices'"):
        load(folder, "both", "choices")


def test_a_broken_task_file_is_named_with_its_line(folder: Path) -> None:
    (folder / "broken.yaml").write_text("task: broken\nmetric_list: [\n")
    with pytest.raises(UserError, match=r"not readable as YAML") as caught:
        load(folder, "broken")
    assert "broken.yaml:" in caught.value.where


def test_a_missing_data_file_is_named(folder: Path) -> None:
    (folder / "choices.jsonl").unlink()
    with pytest.raises(UserError, match=r"data file of the evaluation task 'choices' is missing: .*choices.jsonl"):
        load(folder, "choices")


def test_a_malformed_data_file_is_told_with_its_task(folder: Path) -> None:
    (folder / "choices.jsonl").write_text('{"prompt": \n')
    with pytest.raises(UserError, match="task 'choices' does not load") as caught:
        load(folder, "choices")
    assert caught.value.where.endswith("choices.yaml")


def test_a_missing_function_is_told_with_its_task(folder: Path) -> None:
    (folder / "utils.py").write_text("def micro(items):\n    return 0.0\n")
    with pytest.raises(UserError, match="process_results"):
        load(folder, "answers")


@pytest.mark.parametrize(("before", "after", "said"), [
    ("{{gold}}", "label", "record 1: the target 'label' is none"), ("{{gold}}", "{{gold + 1}}", "record 3: the target 3 is"),
    ('"{{gold}}"', "!function utils.last", "record 1: the target -1 is"), ("{{gold}}", "{{options[1]}}", ""),
])  # fmt: skip
def test_a_target_that_is_no_choice_is_refused(folder: Path, before: str, after: str, said: str) -> None:
    """lm-eval scores 0 for every model and goes on."""
    file = folder / "choices.yaml"
    (folder / "utils.py").write_text("def last(doc):\n    return -1\n")
    file.write_text(file.read_text().replace(before, after))
    if not said:
        assert load(folder, "choices")
        return
    with pytest.raises(UserError, match=said) as caught:
        load(folder, "choices")
    assert caught.value.where == f"{file}, key doc_to_target"
    assert caught.value.todo.endswith("its fields are prompt, options, gold")


def test_a_data_file_without_documents_is_refused(folder: Path) -> None:
    write_lines(folder / "documents.jsonl", [])
    with pytest.raises(UserError, match="'bpb'"):
        load(folder, "bpb")


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load(tmp_path / "nowhere", "bpb")


def test_pickled_weights_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    import torch

    from tasks.evaluation.model import load_model

    folder = tmp_path / "pickled"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="does not load") as caught:
        load_model(str(folder), "evaluate_base", "cpu", 1)
    assert "safetensors" in caught.value.allowed


def test_a_model_in_bf16_scores_nearly_the_same_in_float32_sums(tiny_model: Path) -> None:
    import torch
    from lm_eval.api.instance import Instance

    from tasks.evaluation.model import load_model

    scores = {}
    for dtype in ("float32", "bfloat16"):
        model = load_model(str(tiny_model), "evaluate_base", "cpu", 1, dtype)
        assert {p.dtype for p in model.model.parameters()} == {getattr(torch, dtype)}
        request = Instance("loglikelihood", {}, ("the bank", " reports its capital to the regulator"), 0)
        scores[dtype] = model.loglikelihood([request])[0][0]
    assert scores["float32"] != scores["bfloat16"] == pytest.approx(scores["float32"], rel=0.01)


def test_batches_fit_the_budget_and_threads_fit_the_model() -> None:
    from tasks.evaluation.model import MAX_ROWS, rows_that_fit
    from tasks.threads import choose_threads

    assert rows_that_fit(100, 4 * 1024, "cpu") == MAX_ROWS["cpu"]  # 400 KB a row: the cap
    assert rows_that_fit(8192, 4 * 150_000, "cpu") == 1
    assert rows_that_fit(1000, 4 * 50_000, "cpu") == 5
    assert [choose_threads(size, 8, "generate") for size in (1_000_000, 120_000_000, 8_000_000_000)] == [1, 2, 8]


def test_local_tasks_are_evaluated_offline_and_others_as_the_launcher_says(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    from tasks.evaluation.environment import OFFLINE, set_environment
    from tasks.stage import Order

    (folder / "group.yaml").write_text("group: all_of_it\ntask: [choices, bpb]\n")
    for names, offline in ((["choices", "all_of_it"], True), (["choices", "arc_easy"], False)):
        for variable in (*OFFLINE, "HF_DATASETS_CACHE"):
            monkeypatch.setenv(variable, "before")
        order = Order("evaluate_base", "evaluate", "t", {"tasks": {"domain": names}}, {}, {"include_path": str(folder)})
        set_environment(order, "/cache")
        assert (os.environ["HF_HUB_OFFLINE"], os.environ["HF_DATASETS_CACHE"]) == (
            ("1", "/cache") if offline else ("before", "before")
        )


def test_a_template_stays_in_its_sandbox(folder: Path) -> None:
    """lm-eval renders all of a task's templates with this function."""
    from jinja2.exceptions import SecurityError
    from lm_eval.utils import apply_template

    [task] = load(folder, "choices")["choices"]
    assert apply_template("{{ gold | regex_replace('a', 'b') }}\n", {"gold": "aa"}) == "bb\n"
    task.config.doc_to_text = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(SecurityError):
        task.doc_to_text(task.eval_docs[0])
