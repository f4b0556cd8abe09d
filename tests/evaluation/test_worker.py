"""The worker as it runs: one process, several directories, no network."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tasks.evaluation.__main__ import main
from tasks.reporting.gather import RunRecord, StageRecord
from tasks.reporting.results import results_frame
from tasks.stage import ARTIFACT, ERROR, ORDER, Order, file_sha256, is_done, read_artifact, read_order, write_order
from tests.conftest import ROOT
from tests.evaluation.conftest import DOCUMENTS, Evaluated, evaluation_order, write_tasks


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_directory_is_done_and_counted(evaluated: Evaluated) -> None:
    assert is_done(evaluated.base) and is_done(evaluated.cpt) and is_done(evaluated.limited)
    counts = read_artifact(evaluated.base)["counts"]
    assert (counts["tasks"], counts["samples"]) == (3, 6 + 5 + 9)
    assert read_artifact(evaluated.limited)["counts"]["samples"] == 3 * 2


def test_no_network_address_is_tried(evaluated: Evaluated) -> None:
    assert set(evaluated.sockets.splitlines()) == {"watching"}  # one line a process: lm-eval starts some of its own


def test_results_name_every_metric_with_its_direction(evaluated: Evaluated) -> None:
    results = json.loads((evaluated.base / "results.json").read_text())
    assert {task: sorted(metrics) for task, metrics in results["tasks"].items()} == {
        "answers": ["length", "nothing", "overlap"],
        "choices": ["acc"],
        "bpb": ["bits_per_byte"],
    }
    assert results["n"] == {"answers": 6, "choices": 5, "bpb": 9}
    assert results["higher_is_better"]["bpb"] == {"bits_per_byte": False}
    assert results["higher_is_better"]["choices"] == {"acc": True}


def test_a_metric_without_a_number_is_null_and_said(evaluated: Evaluated) -> None:
    results = json.loads((evaluated.base / "results.json").read_text())
    assert results["tasks"]["answers"]["nothing"] is None
    assert read_artifact(evaluated.base)["counts"]["undefined_metrics"] == ["answers nothing"]
    assert "no number came out for answers nothing" in evaluated.log


def test_the_same_model_gives_the_same_bytes(evaluated: Evaluated) -> None:
    names = sorted(path.name for path in (evaluated.base / "samples").iterdir())
    assert names == ["answers.jsonl", "bpb.jsonl", "choices.jsonl"]
    for name in [f"samples/{name}" for name in names] + ["results.json"]:
        content = (evaluated.base / name).read_bytes()
        assert content == (evaluated.cpt / name).read_bytes(), name
        assert b"/tmp" not in content and str(ROOT).encode() not in content


def test_samples_follow_the_order_of_the_documents(evaluated: Evaluated) -> None:
    lines = read_lines(evaluated.base / "samples/bpb.jsonl")
    lengths = [len(document) for document in DOCUMENTS]
    assert lengths != sorted(lengths) and lengths != sorted(lengths, reverse=True)
    assert [line["target"] for line in lines] == DOCUMENTS
    assert [line["doc_id"] for line in lines] == list(range(len(DOCUMENTS)))


def test_samples_hold_what_each_aggregation_takes(evaluated: Evaluated) -> None:
    results = json.loads((evaluated.base / "results.json").read_text())["tasks"]
    answers = read_lines(evaluated.base / "samples/answers.jsonl")
    assert all(isinstance(line["response"], str) and line["prompt"].startswith("<|im_start|>") for line in answers)
    mean = sum(line["metrics"]["length"] for line in answers) / len(answers)
    assert mean > 0 and mean == pytest.approx(results["answers"]["length"])
    pairs = [line["metrics"]["bits_per_byte"] for line in read_lines(evaluated.base / "samples/bpb.jsonl")]
    bits = -sum(score for score, _ in pairs) / sum(num_bytes for _, num_bytes in pairs) / 0.6931471805599453
    assert bits == pytest.approx(results["bpb"]["bits_per_byte"])


def test_document_scores_are_those_of_the_bare_model(evaluated: Evaluated) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(evaluated.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(evaluated.model)
    for line in read_lines(evaluated.base / "samples/bpb.jsonl"):
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode(line["target"])]])
        assert ids.shape[1] <= 129  # one window, so one forward pass is the whole score
        with torch.no_grad():
            log_probs = model(ids[:, :-1]).logits.log_softmax(-1)
        expected = log_probs.gather(2, ids[:, 1:, None]).sum().item()
        assert line["response"] == pytest.approx(expected, abs=1e-2)


def test_there_is_a_sign_of_life_in_every_phase(evaluated: Evaluated) -> None:
    for what in ("loading lm-eval", "reading 3 tasks", "loading the model", "answers generated 6/6",
                 "continuations scored 15/15", "documents scored 9/9", "done: 3 tasks, 20 samples"):  # fmt: skip
        assert f"\n[steep] evaluate_base {what}" in f"\n{evaluated.log}"
    assert "it/s]" not in evaluated.log  # a bar would be glued to what is said
    speeds = re.findall(r"evaluate_base \S+ (generated|scored) [^\n]* ([\d,]+) tok/s  ETA", evaluated.log)
    assert len(speeds) >= 3 and all(speed != "0" for _, speed in speeds), evaluated.log


def test_an_unknown_task_ends_with_an_error_file_and_nothing_else(
    tmp_path: Path, tiny_model: Path, task_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = evaluation_order(tmp_path, "base", tiny_model, task_folder, tasks=["choicse"])
    with pytest.MonkeyPatch.context() as environment:  # the worker sets its own
        environment.setattr(os, "environ", os.environ.copy())
        assert main([directory]) == 2
    assert "did you mean 'choices'?" in (directory / ERROR).read_text()
    assert "did you mean 'choices'?" in capsys.readouterr().out
    assert {path.name for path in directory.iterdir()} == {ORDER, ERROR}


def test_a_directory_that_is_done_is_not_computed_again(evaluated: Evaluated) -> None:
    before = (evaluated.base / ARTIFACT).stat().st_mtime_ns
    assert main([evaluated.base]) == 0
    assert (evaluated.base / ARTIFACT).stat().st_mtime_ns == before


@pytest.mark.parametrize("moment", ["before it begins", "while it computes"])
def test_data_that_is_replaced_gives_no_result_under_the_key_of_the_old(
    tmp_path: Path, tiny_model: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.evaluation import run

    write_tasks(tmp_path)
    directory, data = evaluation_order(tmp_path, "base", tiny_model, tmp_path), tmp_path / "answers.jsonl"
    order = read_order(directory)
    files = [{"path": str(data), "sha256": file_sha256(data)}]
    directory = write_order(replace(order, what=order.what | {"files": files}), tmp_path)
    evaluated = []

    def replace_data(*told: object) -> None:
        evaluated.extend(told)
        data.write_text(data.read_text().replace("bank", "bonk"))

    monkeypatch.setattr(run, "evaluate", replace_data)
    if moment == "before it begins":
        replace_data()
    with pytest.MonkeyPatch.context() as environment:  # the worker sets its own
        environment.setattr(os, "environ", os.environ.copy())
        assert main([directory]) == 2
    assert f"{data} changed after this run was planned" in (directory / ERROR).read_text()
    assert bool(evaluated) == (moment == "while it computes") and not (directory / ARTIFACT).exists()


GROUPS = """
group: outer
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
task:
- group: within
  aggregate_metric_list: [{metric: acc, weight_by_size: true}]
  task: [choices]
- inner
"""


def test_aggregates_of_groups_within_a_group_stand_on_the_side_of_its_name(tmp_path: Path, tiny_model: Path) -> None:
    write_tasks(tmp_path)
    more = (tmp_path / "choices.yaml").read_text().replace("task: choices", "task: more")
    (tmp_path / "more.yaml").write_text(more)
    (tmp_path / "outer.yaml").write_text(GROUPS)
    (tmp_path / "inner.yaml").write_text("group: inner\naggregate_metric_list: [{metric: acc}]\ntask: [more]\n")
    order = read_order(evaluation_order(tmp_path, "base", tiny_model, tmp_path, limit=2))
    what = order.what | {"tasks": {"domain": ["bpb"], "general": ["outer"]}}
    directory = write_order(replace(order, what=what), tmp_path)
    with pytest.MonkeyPatch.context() as environment:  # the worker sets its own
        environment.setattr(os, "environ", os.environ.copy())
        assert main([directory]) == 0
    asked = json.loads((directory / "results.json").read_text())["asked"]
    general = ("outer", "outer::within", "inner", "choices", "more")
    assert asked == {"bpb": "bpb"} | dict.fromkeys(general, "outer")
    record = StageRecord("evaluate_base", directory, read_order(directory), read_artifact(directory))
    report = Order("report", "report", "test", what["tasks"], {})
    rows = results_frame(RunRecord(report, {"evaluate_base": record})).to_dict("records")
    assert {row["task"]: row["side"] for row in rows} == {"bpb": "domain"} | dict.fromkeys(general, "general")
