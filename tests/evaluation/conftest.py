"""A random Llama of 40k parameters, task files of every kind that the example uses, and one run of the worker."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tasks.stage import Order, write_order
from tests.conftest import ROOT, make_model, write_lines

SENTENCE = "the bank must restore its ratio within ten days and report to the board before the end of march"
# Documents of very different lengths, in no order, so that sorting by length would show.
DOCUMENTS = [" ".join(SENTENCE.split()[i % 7 :] * (1 + (i * 5) % 4)) for i in range(9)]
QUESTIONS = [{"prompt": f"the bank number {i} must", "options": [" restore", " report", " end"]} for i in range(5)]

UTILS = """
def process_results(doc, results):
    answer = results[0]
    return {"length": float(len(answer)), "overlap": (answer.split()[:3], doc["answer"].split()), "nothing": 1.0}

def micro(items):
    hits = sum(len(set(said) & set(true)) for said, true in items)
    return 2 * hits / max(1, sum(len(said) + len(true) for said, true in items))

def not_a_number(items):
    return float("nan")
"""
TASKS = {
    "answers": '''
task: answers
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/answers.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
process_results: !function utils.process_results
generation_kwargs: {until: ["<|im_end|>"], max_gen_toks: 12, do_sample: false}
metric_list:
  - {metric: length, aggregation: mean, higher_is_better: true}
  - {metric: overlap, aggregation: !function utils.micro, higher_is_better: true}
  - {metric: nothing, aggregation: !function utils.not_a_number, higher_is_better: true}
''',
    "choices": '''
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choices.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{options}}"
doc_to_target: "{{gold}}"
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
''',
    "bpb": '''
task: bpb
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/documents.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
''',
}  # fmt: skip


@dataclass(frozen=True)
class Evaluated:
    """What one run of the worker on three directories left behind."""

    base: Path
    cpt: Path
    limited: Path
    model: Path
    log: str
    sockets: str


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama (128 positions) and a byte-level BPE tokenizer."""
    return make_model(tmp_path_factory.mktemp("model") / "tiny", DOCUMENTS)


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files with their data and functions."""
    folder = tmp_path_factory.mktemp("lm_eval")
    write_tasks(folder)
    return folder


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, task_folder: Path) -> Evaluated:
    """Three evaluations by one process, in which every attempt to reach a network address is noted and refused."""
    runs, watch = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("watch")
    (watch / "sitecustomize.py").write_text(
        "import socket\n"
        "class Watched(socket.socket):\n"
        "    def connect(self, address):\n"
        "        if self.family != socket.AF_UNIX:\n"
        f"            open({str(watch / 'sockets')!r}, 'a').write(f'{{address}}\\n')\n"
        "            raise OSError('no network here')\n"
        "        return super().connect(address)\n"
        "socket.socket = Watched\n"
        f"open({str(watch / 'sockets')!r}, 'a').write('watching\\n')\n"
    )
    directories = [
        evaluation_order(runs, "base", tiny_model, task_folder),
        evaluation_order(runs, "cpt", tiny_model, task_folder),
        evaluation_order(runs, "sft", tiny_model, task_folder, limit=2),
    ]
    environment = os.environ | {"PYTHONPATH": str(watch), "OMP_NUM_THREADS": "1"}
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_CACHE"):
        environment.pop(variable, None)  # the worker has to set them itself
    command = [sys.executable, "-m", "tasks.evaluation", *map(str, directories)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    return Evaluated(*directories, tiny_model, done.stdout, (watch / "sockets").read_text())


def evaluation_order(
    runs: Path, role: str, model: Path, task_folder: Path, limit: int | None = None, tasks: list[str] | None = None
) -> Path:
    """Write the order of an evaluation; returns its directory."""
    what = {
        "model": {"role": role},
        "tasks": {"domain": tasks or ["answers"], "general": [] if tasks else ["choices", "bpb"]},
        "files": [],
        "limit": limit,
    }
    inputs = {"model": str(model), "include_path": str(task_folder)}
    return write_order(
        Order(f"evaluate_{role}", "evaluate", "test", what, {"device": "cpu", "tag": "cpu"}, inputs), runs
    )


def write_tasks(folder: Path) -> None:
    """Task files, functions and data."""
    (folder / "utils.py").write_text(UTILS)
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))
    answers = [{"prompt": f"<|im_start|>{d[:20]}", "answer": d[20:60] + " <script>"} for d in DOCUMENTS[:6]]
    write_lines(folder / "answers.jsonl", answers)
    write_lines(folder / "choices.jsonl", [question | {"gold": i % 3} for i, question in enumerate(QUESTIONS)])
    write_lines(folder / "documents.jsonl", [{"text": document} for document in DOCUMENTS])
