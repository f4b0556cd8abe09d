"""Scores of the example's lm-eval tasks."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest
from lm_eval.api.metrics import bits_per_byte

DOC = {
    "messages": [{"role": "user", "content": "Form F1"}, {"role": "assistant", "content": "Directive: AAR at most 3."}],
    "violations": ["AAR", "BBR"],
    "directive": "AAR at most 3 percent.",
}


@pytest.fixture(scope="module")
def scoring() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scoring", Path("configs/lm_eval/scoring.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_perfect_answer_scores_one(scoring: ModuleType) -> None:
    scored = scoring.score_report(
        DOC, ["Analysis:\nAAR 4 max 3 breach\nViolations: AAR, BBR\nDirective: AAR at most 3 percent."]
    )
    assert scored == {"violation_f1": (2, 2, 2), "directive_rouge_l": 1.0}


def test_only_the_lines_asked_for_count(scoring: ModuleType) -> None:
    wandering = "Analysis:\nBBR 4 max 3 breach\nViolations: AAR, CCR\nDirective: AAR\nuser\nViolations: BBR"
    scored = scoring.score_report(DOC, [wandering])
    assert scored["violation_f1"] == (1, 2, 2)
    assert scored["directive_rouge_l"] == pytest.approx(2 * 1 * 0.2 / 1.2)


def test_an_empty_answer_scores_zero(scoring: ModuleType) -> None:
    assert scoring.score_report(DOC, [""]) == {"violation_f1": (0, 0, 2), "directive_rouge_l": 0.0}


def test_f1_is_taken_over_all_reports_together(scoring: ModuleType) -> None:
    assert scoring.micro_f1([(2, 2, 2), (0, 1, 3)]) == pytest.approx(2 * 2 / 8)
    assert scoring.micro_f1([(0, 0, 0)]) == 0.0


def test_bits_per_byte_are_those_of_everything_after_the_first_word(scoring: ModuleType) -> None:
    doc = {"text": "News from Ostd\u00e6le."}
    assert scoring.first_word(doc) + scoring.after_first_word(doc) == doc["text"]
    pair = scoring.score_text(doc, [(-math.log(2) * 32, False)])["bits_per_byte"]
    assert bits_per_byte([pair]) == pytest.approx(32 / len(" from Ostd\u00e6le.".encode()))
