"""Answers of base, CPT and SFT side by side with what was wanted, and rows as they were trained."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from tasks.evaluation.results import SAMPLES, file_name
from tasks.reporting.blocks import Column, Columns, Piece
from tasks.reporting.gather import RunRecord, StageRecord
from tasks.reporting.results import TITLES

MAX_TASKS, SAMPLES_A_TASK = 2, 3
MAX_CHARS = 1400
ROWS_A_SOURCE = 1
NEWLINE = "\n"
EMPTY_LINES = re.compile(r"\n(?:[ \t]*\n){3,}")


def side_by_side(run: RunRecord) -> Iterator[Columns]:
    """A few held-out answers, spread over each task whose answers are text; domain tasks first."""
    for task in text_tasks(run)[:MAX_TASKS]:
        lines = {role: run.evaluation(role).lines(f"{SAMPLES}/{file_name(task)}.jsonl") for role in run.roles}
        first = next(iter(lines.values()))
        for position in spread(len(first), SAMPLES_A_TASK):
            wanted = first[position]
            columns = [Column("Wanted", [Piece(cut(as_text(wanted["target"])))])]
            columns += [_answer(role, lines[role][position]) for role in run.roles]
            prompt = Column("Prompt", [Piece(cut(as_text(wanted["prompt"])))])
            yield Columns(f"{task}, document {wanted['doc_id']}", columns, folded=prompt)


def text_tasks(run: RunRecord) -> list[str]:
    """Tasks whose answers are text, in the order of the run's file."""
    if not run.roles:
        return []
    record = run.evaluation(run.roles[0])
    asked = [*run.order.what.get("domain", []), *run.order.what.get("general", [])]
    tasks = sorted(record.json("results.json")["tasks"], key=lambda t: asked.index(t) if t in asked else len(asked))
    return [task for task in tasks if _is_text(record, task)]


def trained_rows(stage: StageRecord) -> Iterator[Columns]:
    """Documents and chats of a preparation as the model saw them, with what is trained on marked."""
    for source, documents in (stage.json("examples.json") or {}).items():
        for document in documents[:ROWS_A_SOURCE]:
            pieces = [Piece(cut(piece["text"]), bool(piece["trained"])) for piece in document["pieces"]]
            packed = document.get("packed_tokens", document["tokens"])
            end = f", cut at {packed:,}" if packed < document["tokens"] else ""
            yield Columns(source, [Column(f"{document['tokens']:,} tokens{end}", pieces, document["where"])])


def spread(length: int, count: int) -> list[int]:
    """`count` positions spread over `length`, the first one included."""
    return sorted({i * length // count for i in range(min(length, count))})


def cut(text: str) -> str:
    """The text as it is shown: many empty lines become a note (a model that learned nothing repeats them), and the end
    of a long text is left out."""
    text = EMPTY_LINES.sub(lambda found: f"\n[{len(found.group().split(NEWLINE)) - 2} empty lines]\n", text)
    return text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]}\n[{len(text) - MAX_CHARS:,} characters more]"


def as_text(value: Any) -> str:
    """A target or prompt, which a task may give as a list."""
    return value if isinstance(value, str) else "" if value is None else str(value)


def _answer(role: str, line: dict[str, Any]) -> Column:
    plain = {name: value for name, value in line["metrics"].items() if isinstance(value, int | float)}
    note = "  ".join(f"{name} {value:.2f}" for name, value in plain.items())
    return Column(TITLES[role], [Piece(cut(as_text(line["response"])) or " ")], note)


def _is_text(record: StageRecord, task: str) -> bool:
    for line in record.lines(f"{SAMPLES}/{file_name(task)}.jsonl"):
        return isinstance(line["response"], str)
    return False
