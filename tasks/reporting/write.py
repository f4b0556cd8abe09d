"""Writes a report's outputs: results.csv, report.md with its plots, report.html; then the artifact."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tasks.progress import Progress
from tasks.reporting.blocks import Figure, Gallery, Section
from tasks.reporting.gather import gather
from tasks.reporting.html import render_html
from tasks.reporting.markdown import render_markdown
from tasks.reporting.page import make_sections, subtitle
from tasks.reporting.results import gate_verdict, results_csv, results_frame
from tasks.stage import finish, write_text

CSV, MARKDOWN, HTML = "results.csv", "report.md", "report.html"


def write_report(directory: Path) -> dict[str, Any]:
    """Read every stage that the order names, write the report, and finish the stage; returns its artifact."""
    started_at = time.monotonic()
    run = gather(directory)
    sections, title, facts = make_sections(run), run.order.run, subtitle(run)
    frame = results_frame(run)
    plots = [figure for section in sections for figure in _figures(section)]
    progress = Progress("report", "plot", len(plots))
    for number, figure in enumerate(plots, start=1):
        _write_bytes(directory / f"{figure.name}.png", figure.png)
        progress.update(number)
    write_text(directory / MARKDOWN, render_markdown(title, facts, sections))
    write_text(directory / HTML, render_html(title, facts, sections))
    write_text(directory / CSV, results_csv(frame))
    outputs = [CSV, MARKDOWN, HTML, *(f"{figure.name}.png" for figure in plots)]
    counts = {"figures": len(frame), "models": run.roles, "plots": len(plots)}
    if verdict := gate_verdict(run):
        counts["gate"] = verdict
    return finish(directory, outputs, counts, time.monotonic() - started_at)


def _figures(section: Section) -> list[Figure]:
    return [figure for block in section.blocks if isinstance(block, Gallery) for figure in block.figures]


def _write_bytes(path: Path, content: bytes) -> None:
    aside = path.with_name(f".{path.name}.writing")
    aside.write_bytes(content)
    aside.replace(path)
