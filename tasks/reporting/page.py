"""The sections of the page, in the order in which they are read. A new section is one function more in `SECTIONS`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pandas as pd

from tasks.progress import clock
from tasks.reporting import facts, samples
from tasks.reporting.blocks import Block, Cell, Gallery, Section, Table, Text, Tone
from tasks.reporting.curves import training_figure
from tasks.reporting.gate import say_verdict
from tasks.reporting.gather import RunRecord
from tasks.reporting.numbers import listed, number, signed
from tasks.reporting.results import DIFFERENCES, TITLES, gate_verdict, is_better, results_frame

ARROWS = {True: "\u2191", False: "\u2193", None: ""}
SIDES = {"domain": "Domain: what it should gain", "general": "General: what it should not forget"}


def make_sections(run: RunRecord) -> list[Section]:
    """Every section that has something to say."""
    sections = [make(run) for make in SECTIONS]
    return [section for section in sections if section.blocks]


def subtitle(run: RunRecord) -> list[str]:
    """A line of facts under the title."""
    stages = list(run.stages.values())
    seconds = sum(stage.artifact["seconds"] for stage in stages)
    commits = sorted({str(stage.artifact.get("commit") or "") for stage in stages} - {""})
    tags = sorted({str(stage.artifact.get("how", {}).get("tag", "")) for stage in stages} - {""})
    said = [max(stage.artifact["finished_at"] for stage in stages)[:10], f"{clock(seconds)} of computing"]
    said += [f"on {', '.join(tags)}"] if tags else []
    return said + ([f"commit {', '.join(commits)}"] if commits else [])


def gate(run: RunRecord) -> Section:
    """The gate's verdict, and what decided it."""
    verdict = gate_verdict(run)
    if verdict is None:
        return Section("Gate")
    rows: list[list[str | Cell]] = []
    for row in verdict["compared"]:
        said = Cell("yes", "good") if row["passes"] else Cell("no", "bad")
        metric, gain, bound = row["metric"] or "none with a direction", row["gain"], row["bound"]
        rows.append([row["task"], metric, *("\u2013" if v is None else signed(v) for v in (gain, bound)), said])
    caption = "gain over the base, in the direction that is better; \u2013 without a number, which does not pass"
    table = Table(["task", "metric", "gain", "at least", "passes"], rows, num_text_columns=2, caption=caption)
    return Section("Gate", [Text(say_verdict(verdict)), table])


def results(run: RunRecord) -> Section:
    """The result table."""
    if not run.roles:
        return Section("Results", [Text("This run evaluates nothing: its config has no `evaluate`.")])
    return Section("Results", [result_table(results_frame(run), run.roles), *_rounded(run)])


def _rounded(run: RunRecord) -> list[Block]:
    """Which models were evaluated in bf16; none where all were in float32."""
    rounded = [TITLES[role] for role in run.roles if run.evaluation(role).counts.get("dtype", "float32") != "float32"]
    if not rounded:
        return []
    same = len(rounded) == len(run.roles)
    warning = "" if same else " The others were in float32, so differences between them hold that of the precision."
    return [Text(f"Evaluated in bfloat16, as float32 did not fit the GPU: {listed(rounded)}.{warning}")]


def result_table(frame: pd.DataFrame, roles: Sequence[str]) -> Table:
    """The frame as a table; models that were not evaluated have no column."""
    differences = [(later, earlier) for later, earlier in DIFFERENCES if later in roles and earlier in roles]
    header = ["task", "metric", "n", *(TITLES[role] for role in roles)]
    header += [f"{TITLES[later]} \u2212 {TITLES[earlier]}" for later, earlier in differences]
    rows: list[list[str | Cell]] = []
    for side, title in SIDES.items():
        of_side = frame[frame["side"] == side]
        if len(of_side):
            rows.append([title])
        previous = ""
        for row in of_side.to_dict("records"):
            better = row["higher_is_better"] if isinstance(row["higher_is_better"], bool) else None
            name = Cell(row["task"], "quiet" if row["task"] == previous else "")
            values = [number(row[role]) or "\u2013" for role in roles]
            changes = [_difference(row[later], row[earlier], better) for later, earlier in differences]
            previous = row["task"]
            metric = f"{row['metric']} {ARROWS[better]}".rstrip()
            rows.append([name, metric, number(row["n"]), *values, *changes])
    caption = "\u2191 higher is better, \u2193 lower is better; n documents a task"
    return Table(header, rows, num_text_columns=2, caption=caption, style="lead")


def answers(run: RunRecord) -> Section:
    """Answers side by side."""
    return Section("Held-out answers", list(samples.side_by_side(run)))


def training(run: RunRecord) -> Section:
    """Curves and what each stage did."""
    if not run.trained:
        return Section("Training")
    figures = [figure for figure in map(training_figure, run.trained) if figure]
    blocks: list[Block] = [Gallery(figures)] if figures else []
    return Section("Training", [*blocks, facts.training_table(run)])


def data(run: RunRecord) -> Section:
    """Mix, ledger and new tokens."""
    blocks: list[Block] = []
    told: list[str] = []  # SFT's tokenizer is CPT's: tokens are told where they first came in
    for stage in run.prepared:
        blocks += [table for table in (facts.mix_table(stage), facts.ledger_table(stage)) if table]
        added = [token for token in stage.counts.get("added_tokens", []) if token not in told]
        if added:
            told += added
            blocks.append(Text(f"The chat template added {len(added)} tokens: {listed(added)}. Their embedding rows "
                               "start from the mean of all others."))  # fmt: skip
    return Section("Data", blocks)


def rows(run: RunRecord) -> Section:
    """Rows as they were trained."""
    blocks = [example for stage in run.prepared for example in samples.trained_rows(stage)]
    return Section("Data as the model saw it (marked: what carries loss)", blocks, folded=True)


def recipe(run: RunRecord) -> Section:
    """The settings."""
    return Section("Recipe", [facts.recipe_table(run)] if run.trained else [], folded=True)


def provenance(run: RunRecord) -> Section:
    """Time, versions, hardware, lineage."""
    tables = [facts.timings_table(run), facts.versions_table(run), facts.hardware_table(run), facts.lineage_table(run)]
    return Section("Time, versions, hardware, lineage", tables, folded=True)


SECTIONS: tuple[Callable[[RunRecord], Section], ...] = (
    gate, results, answers, training, data, rows, recipe, provenance,
)  # fmt: skip


def _difference(later: float, earlier: float, higher_is_better: bool | None) -> Cell:
    """A loss (bits per byte, perplexity) has no natural scale, so its change is also told in percent."""
    tones: dict[bool | None, Tone] = {True: "good", False: "bad", None: "quiet"}
    value = later - earlier
    relative = f" ({signed(100 * value / earlier, 1)} %)" if higher_is_better is False and earlier and value else ""
    return Cell(signed(value) + ("" if math.isnan(value) else relative), tones[is_better(value, higher_is_better)])
