"""Writes the example's files: `python -m data.regulator`. The same bytes on every machine.

    regulations.jsonl  general.jsonl  reports.jsonl          for training
    eval/regulations.jsonl  eval/general.jsonl  eval/facts.jsonl  eval/reports.jsonl          held out

The held-out records are drawn first, and what is drawn for training afterwards is never one of them.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from data.regulator import general, regulations, reports
from data.regulator.world import RARE_FORMS, TOWNS

FOLDER = Path(__file__).parent
NUM_REGULATIONS, NUM_GENERAL, NUM_REPORTS = 4500, 5000, 3400
NUM_HELD_OUT_REGULATIONS, NUM_HELD_OUT_GENERAL, NUM_HELD_OUT_REPORTS = 100, 160, 120
# Each of the 15 rare ratios stands in about 35 lines of the instruction data: enough to meet the code in a report,
# too few to learn its limit, article, measure and days from.
RARE_SHARE = 0.04

Record = dict[str, Any]


def main(folder: Path = FOLDER) -> None:
    """Write every file below `folder`."""
    held_out = held_out_records()
    for name, records in {**training_records(held_out), **held_out}.items():
        write_jsonl(folder / f"{name}.jsonl", records)


def held_out_records() -> dict[str, list[Record]]:
    """What is evaluated, by name of its file."""
    rng = random.Random("facts")
    return {
        "eval/regulations": draw("held-out regulations", NUM_HELD_OUT_REGULATIONS, _text(regulations.document)),
        "eval/general": draw("held-out general", NUM_HELD_OUT_GENERAL, _text(general.document)),
        "eval/facts": [general.cloze(rng, town, fact) for town in TOWNS.values() for fact in general.FACTS],
        "eval/reports": draw("held-out reports", NUM_HELD_OUT_REPORTS, _held_out_report),
    }


def training_records(held_out: dict[str, list[Record]]) -> dict[str, list[Record]]:
    """What is trained on, by name of its file; nothing of it is held out."""
    return {
        "regulations": draw("regulations", NUM_REGULATIONS, _text(regulations.document), held_out["eval/regulations"]),
        "general": draw("general", NUM_GENERAL, _text(general.document), held_out["eval/general"]),
        "reports": [{"messages": record["messages"]} for record in draw("reports", NUM_REPORTS, _training_report,
                                                                       held_out["eval/reports"])],
    }  # fmt: skip


def draw(seed: str, num: int, make: Callable[[random.Random], Record], without: Iterable[Record] = ()) -> list[Record]:
    """`num` different records, none of which asks or says what one of `without` does."""
    rng = random.Random(seed)
    records: list[Record] = []
    seen = {content(record) for record in without}
    while len(records) < num:
        record = make(rng)
        if content(record) not in seen:
            seen.add(content(record))
            records.append(record)
    return records


def content(record: Record) -> str:
    """What makes a record the same as another: a document's text, or a chat's question."""
    return str(record["text"] if "text" in record else record["messages"][0]["content"])


def write_jsonl(path: Path, records: Iterable[Record]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def _text(document: Callable[[random.Random], str]) -> Callable[[random.Random], Record]:
    return lambda rng: {"text": document(rng)}


def _held_out_report(rng: random.Random) -> Record:
    return reports.report(rng, rng.choice(RARE_FORMS))


def _training_report(rng: random.Random) -> Record:
    return reports.training_report(rng, RARE_SHARE)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
