"""The gate's verdict: who passes, who does not and by which metric, and where it is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tasks.artifacts import _left_behind
from tasks.plan import Planned
from tasks.reporting.__main__ import main
from tasks.reporting.gate import NOT_PASSED, PASSED, judge, missed_by
from tasks.reporting.terminal import result_table_text
from tasks.stage import read_artifact, read_order
from tests.reporting.conftest import METRICS, make_run

BOUNDS = {"min_domain_gain": 0.02, "max_general_drop": 0.01}
NAN = float("nan")


def row(side: str, base: float, sft: float, higher: bool | None = True, task: str = "") -> dict[str, Any]:
    return {"side": side, "asked": task or side, "task": task or side, "metric": "acc", "higher_is_better": higher,
            "base": base, "cpt": NAN, "sft": sft}  # fmt: skip


def verdict(*rows: dict[str, Any], tasks: tuple[str, ...] = ()) -> tuple[str, list[str]]:
    found = judge(BOUNDS, "sft", rows, tasks)
    return found["verdict"], [missed["task"] for missed in missed_by(found)]


def test_a_model_that_gains_and_keeps_passes() -> None:
    assert verdict(row("domain", 0.5, 0.6), row("general", 0.8, 0.795), tasks=("domain", "general")) == (PASSED, [])


def test_a_gain_or_drop_of_exactly_the_bound_passes() -> None:
    assert 0.82 - 0.80 < 0.02 and 0.79 - 0.80 < -0.01  # the roundings that must not decide
    assert verdict(row("domain", 0.80, 0.82), row("general", 0.80, 0.79)) == (PASSED, [])


@pytest.mark.parametrize("sft", [0.5, 0.519, 0.4, NAN])
def test_a_domain_metric_that_gains_too_little_fails(sft: float) -> None:
    assert verdict(row("domain", 0.5, sft), row("general", 0.8, 0.8)) == (NOT_PASSED, ["domain"])


@pytest.mark.parametrize("sft", [0.789, 0.0, NAN])
def test_a_general_metric_that_drops_too_far_fails(sft: float) -> None:
    assert verdict(row("domain", 0.5, 0.6), row("general", 0.8, sft)) == (NOT_PASSED, ["general"])


def test_a_base_without_a_number_fails() -> None:
    assert verdict(row("domain", NAN, 0.6)) == (NOT_PASSED, ["domain"])


def test_of_a_loss_less_is_a_gain() -> None:
    assert verdict(row("domain", 1.0, 0.9, False), row("general", 1.0, 1.005, False)) == (PASSED, [])
    assert verdict(row("domain", 1.0, 1.1, False), row("general", 1.0, 1.02, False))[1] == ["domain", "general"]


def test_a_metric_without_a_direction_is_not_compared_and_a_task_of_only_such_fails() -> None:
    rows = [row("domain", 0.5, 0.6), row("domain", 0.5, 0.1, None), row("general", 0.5, 0.5, None)]
    assert verdict(*rows, tasks=("domain",)) == (PASSED, [])
    assert verdict(*rows, tasks=("domain", "general", "gone")) == (NOT_PASSED, ["general", "gone"])


def test_a_run_that_fails_says_so_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = make_run(tmp_path / "runs", gate=BOUNDS)
    assert main(directory) == 0  # the verdict is told; it stops nothing
    line = "gate not passed: 3 of 5 metrics miss their bound, SFT against base (min_domain_gain 0.02, max_general_drop 0.01)"
    gate = read_artifact(directory)["counts"]["gate"]
    missed = {(one["task"], one["metric"]): (one["gain"], one["bound"]) for one in missed_by(gate)}
    assert gate["verdict"] == NOT_PASSED and set(missed) == {
        ("violations", "nothing"), ("general_bpb", "bits_per_byte"), ("facts", "acc"),
    }  # fmt: skip
    assert missed[("violations", "nothing")] == (None, 0.02)
    assert missed[("facts", "acc")] == (pytest.approx(-0.02), -0.01)
    assert line in capsys.readouterr().out  # the run's log
    assert result_table_text(directory).splitlines()[-4:] == [
        line,
        "  violations nothing: no number, at least +0.0200",
        "  general_bpb bits_per_byte: gain -0.0271, at least -0.0100",
        "  facts acc: gain -0.0200, at least -0.0100",
    ]
    page, markdown = (directory / "report.html").read_text(), (directory / "report.md").read_text().replace("\\", "")
    for text in (page, markdown):
        assert line in text and text.index(line) < text.index("Domain: what it should gain")
    planned = Planned(read_order(directory), directory, ())
    assert line in _left_behind([planned])[1]["data"]


def test_a_run_that_passes_names_no_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(METRICS["violations"], "nothing")
    directory = make_run(tmp_path / "runs", ("cpt",), gate={"min_domain_gain": 0.0, "max_general_drop": 0.05})
    assert main(directory) == 0
    last = result_table_text(directory).splitlines()[-1]  # without SFT, the last model is CPT
    assert last.startswith("gate passed: all 4 metrics keep their bound, CPT against base")


def test_without_a_gate_nothing_is_said(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "runs")
    assert main(directory) == 0
    assert "gate" not in read_artifact(directory)["counts"]
    assert "gate" not in result_table_text(directory)
    assert "## Gate" not in (directory / "report.md").read_text()
