"""What the plots show."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from tasks.reporting.curves import MAX_POINTS, _thin, training_figure
from tasks.reporting.gather import RunRecord, gather


def run_of(report_directory: Path) -> RunRecord:
    return gather(report_directory)


def test_plots_follow_the_colours_of_the_page(report_directory: Path) -> None:
    figure = training_figure(run_of(report_directory).stages["cpt"])
    assert figure is not None
    assert "var(--ink)" in figure.svg and "#20242b" not in figure.svg
    assert figure.png.startswith(b"\x89PNG")


def test_sources_and_floor_are_named(report_directory: Path) -> None:
    figure = training_figure(run_of(report_directory).stages["sft"])
    assert figure is not None
    for text in ("laws", "general", "all tokens", "floor 1.0e-04", "learning rate", "step"):
        assert f">{text}</text>" in figure.svg, text


def test_one_source_is_drawn_once(report_directory: Path) -> None:
    stage = run_of(report_directory).stages["cpt"]
    path = stage.directory / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line | {"loss_by_source": {"laws": line["loss"]}}) + "\n" for line in lines))
    figure = training_figure(stage)
    assert figure is not None and ">laws</text>" not in figure.svg and ">all tokens</text>" in figure.svg


def test_a_stage_without_metrics_has_no_plot(report_directory: Path) -> None:
    stage = run_of(report_directory).stages["cpt"]
    (stage.directory / "metrics.jsonl").unlink()
    assert training_figure(stage) is None


def test_long_curves_are_thinned_and_keep_both_ends() -> None:
    for length in (1, MAX_POINTS, MAX_POINTS + 1, 10 * MAX_POINTS + 7):
        kept = _thin(pd.Series(range(length)))
        assert (kept.iloc[0], kept.iloc[-1]) == (0, length - 1)
        assert len(kept) <= MAX_POINTS + 1
