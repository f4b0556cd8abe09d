"""What the example's tasks ask and how they score it; named by `!function` in the YAML files beside this one."""

from __future__ import annotations

import re
from typing import Any

from rouge_score.rouge_scorer import RougeScorer

CODE = re.compile(r"\b[A-Z]{3}\b")
ROUGE = RougeScorer(["rougeL"])

Doc = dict[str, Any]


# --- reports: violations and directive, from one generation ---------------------------------------------------------


def report_question(doc: Doc) -> str:
    """The chat up to where the answer begins, as the base's chat template writes it."""
    return f"<|im_start|>user\n{doc['messages'][0]['content']}<|im_end|>\n<|im_start|>assistant\n"


def report_answer(doc: Doc) -> str:
    """What a perfect analyst answers."""
    return str(doc["messages"][1]["content"])


def score_report(doc: Doc, results: list[str]) -> dict[str, Any]:
    """(hits, named, true) of the violations, and ROUGE-L of the directive, which stands on one line."""
    named, true = set(CODE.findall(_line(results[0], "Violations:"))), set(doc["violations"])
    directive = _line(results[0], "Directive:")
    return {
        "violation_f1": (len(named & true), len(named), len(true)),
        "directive_rouge_l": ROUGE.score(doc["directive"], directive)["rougeL"].fmeasure,
    }


def micro_f1(items: list[tuple[int, int, int]]) -> float:
    """F1 over the violations of all reports together."""
    hits, named, true = (sum(column) for column in zip(*items, strict=True))
    return 2 * hits / max(1, named + true)


def _line(answer: str, label: str) -> str:
    found = re.search(rf"^{label}(.*)$", answer, re.MULTILINE)
    return found.group(1).strip() if found else ""


# --- bits per byte --------------------------------------------------------------------------------------------------


def first_word(doc: Doc) -> str:
    """Where the scored text begins. Documents are trained apart from one another, so a model has never had to guess a
    first token after an end of text; scoring it would add the same noise to every figure."""
    return str(doc["text"].split(" ", 1)[0])


def after_first_word(doc: Doc) -> str:
    """The scored text."""
    return str(doc["text"][len(first_word(doc)) :])


def score_text(doc: Doc, results: list[tuple[float, bool]]) -> dict[str, Any]:
    """(log-likelihood in nats, bytes); lm-eval's aggregation `bits_per_byte` takes them."""
    return {"bits_per_byte": (results[0][0], len(after_first_word(doc).encode()))}
