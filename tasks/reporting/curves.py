"""Loss and learning rate of a training stage. Drawn twice: SVG that takes the page's colours and font, and PNG."""

from __future__ import annotations

import io
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display, and no search for one

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from tasks.reporting.blocks import Figure
from tasks.reporting.gather import StageRecord

TITLES = {"cpt": "Continued pretraining", "sft": "Instruction tuning"}
# Stand-ins that the page's style sheet replaces, so that the plots follow light and dark.
INK, QUIET, LINE = "#20242b", "#68707c", "#d9dde3"
PAGE_COLOURS = {INK: "var(--ink)", QUIET: "var(--quiet)", LINE: "var(--line)"}
SOURCE_COLOURS = ("#2f7ed8", "#e0821b", "#2a9d76", "#c3508f", "#8169cf", "#8c8c3a")
MAX_POINTS = 1500  # more are thinned out: the page stays small
RAW_UP_TO_STEPS = 60  # longer curves get a rolling mean over the raw one
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "steep", "font.size": 9, "axes.spines.top": False,
    "axes.spines.right": False, "text.color": INK, "axes.labelcolor": QUIET, "axes.edgecolor": LINE,
    "xtick.color": QUIET, "ytick.color": QUIET, "grid.color": LINE, "grid.linewidth": 0.6, "axes.axisbelow": True,
}  # fmt: skip


def training_figure(stage: StageRecord) -> Figure | None:
    """Loss (in all and by source) over learning rate; None without metrics."""
    lines = stage.lines("metrics.jsonl")
    if not lines:
        return None
    frame = pd.DataFrame([{k: v for k, v in line.items() if k != "loss_by_source"} for line in lines])
    by_source = pd.DataFrame([line.get("loss_by_source") or {} for line in lines])
    what = stage.order.what
    with plt.rc_context(STYLE):
        figure, (top, bottom) = plt.subplots(
            2, 1, figsize=(6.2, 4.0), height_ratios=(3, 1), sharex=True, layout="constrained"
        )
        draw_loss(top, frame, by_source)
        draw_learning_rate(bottom, frame, what["learning_rate"], what.get("min_lr_ratio", 0.0))
        svg, png = _save(figure)
        plt.close(figure)
    return Figure(f"{stage.name}_curves", TITLES.get(stage.name, stage.name), svg, png)


def draw_loss(axes: Axes, frame: pd.DataFrame, by_source: pd.DataFrame) -> None:
    """Loss over steps: all tokens in ink, sources in colour."""
    for (name, losses), colour in zip(by_source.items(), _colours(len(by_source.columns)), strict=True):
        if len(by_source.columns) > 1:  # one source alone is the total
            _draw(axes, frame["step"], losses, colour, str(name), width=1.3)
    _draw(axes, frame["step"], frame["loss"], INK, "all tokens", width=1.8)
    axes.set_ylabel("loss (nats a token)")
    axes.grid(axis="y")
    axes.legend(frameon=False, fontsize=8, loc="upper right", labelcolor=INK)


def draw_learning_rate(axes: Axes, frame: pd.DataFrame, peak: float, min_lr_ratio: float) -> None:
    """Learning rate over steps, with its floor marked."""
    steps, rates = _thin(frame["step"]), _thin(frame["lr"])
    axes.plot(steps, rates, color=INK, linewidth=1.5)
    floor = peak * min_lr_ratio
    axes.axhline(floor, color=QUIET, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.annotate(f"floor {floor:.1e}", (0.01, floor), xycoords=("axes fraction", "data"), xytext=(0, 3),
                  textcoords="offset points", fontsize=8, color=QUIET)  # fmt: skip
    axes.set_ylim(0, peak * 1.1)
    axes.set_yticks([0, peak])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.1e}" if value else "0"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("learning rate")
    axes.set_xlabel("step")


def _draw(axes: Axes, steps: pd.Series, losses: pd.Series, colour: str, label: str, width: float) -> None:
    losses = losses.astype("float64")
    if len(losses) <= RAW_UP_TO_STEPS:
        axes.plot(
            _thin(steps), _thin(losses.interpolate(limit_area="inside")), color=colour, linewidth=width, label=label
        )
        return
    smooth = losses.rolling(max(3, len(losses) // 40), center=True, min_periods=1).mean()
    axes.plot(_thin(steps), _thin(losses), color=colour, linewidth=0.6, alpha=0.3)
    axes.plot(_thin(steps), _thin(smooth), color=colour, linewidth=width, label=label)


def _thin(values: pd.Series) -> pd.Series:
    every = -(-len(values) // MAX_POINTS)
    kept = values.iloc[::every]
    return kept if (len(values) - 1) % every == 0 else pd.concat([kept, values.iloc[-1:]])  # the last one stays


def _colours(count: int) -> list[str]:
    return [SOURCE_COLOURS[i % len(SOURCE_COLOURS)] for i in range(count)]


def _save(figure: Any) -> tuple[str, bytes]:
    svg, png = io.StringIO(), io.BytesIO()
    figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    figure.savefig(png, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    text = svg.getvalue()
    text = text[text.index("<svg") :]  # without the XML head, which has no place inside a page
    for stand_in, colour in PAGE_COLOURS.items():
        text = text.replace(stand_in, colour)
    return text, png.getvalue()
