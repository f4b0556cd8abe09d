"""The tables beside the results: training, mix, ledger, recipe, timings, versions, lineage."""

from __future__ import annotations

from typing import Any

from tasks.progress import clock
from tasks.reporting.blocks import Cell, Table, Tone
from tasks.reporting.gather import RunRecord, StageRecord
from tasks.reporting.numbers import listed, number, percent, percentage_points, setting, signed, wrapper_text

SHORT_DIGEST, FILES_A_SOURCE = 12, 5
TITLES = {"cpt": "CPT", "sft": "SFT"}
RECIPE = ("learning_rate", "min_lr_ratio", "warmup_ratio", "batch_tokens", "seq_len", "weight_decay", "adam_betas",
          "max_grad_norm", "max_loss_spike", "seed")  # fmt: skip
DATA_RECIPE = ("tokens", "epochs", "max_epochs", "overflow")
HOW_NOT_SHOWN = {"input_digests", "forced_by", "checkpoint", "on_nan", "max_skipped"}


def training_table(run: RunRecord) -> Table:
    """What each training stage did."""
    facts = [
        ("steps", lambda s: number(s.counts.get("steps"))),
        ("tokens", lambda s: number(s.counts.get("tokens"))),
        ("of them trained on", lambda s: number(s.counts.get("supervised_tokens"))),
        ("loss of the last step", lambda s: number(s.counts.get("final_loss"))),
        ("tokens a second", lambda s: number(s.counts.get("tokens_per_second"), digits=0)),
        ("share of weights moved", lambda s: percent(s.counts.get("weights_moved_share"))),
        ("new embedding rows", lambda s: number(s.counts.get("new_embedding_rows"))),
        ("steps skipped (`on_nan`)", lambda s: listed(s.counts.get("skipped_steps") or [])),
        ("resumed at step", lambda s: listed(s.counts.get("resumed_from") or ["never"])),
        ("precision", lambda s: str(s.counts.get("precision") or s.order.how.get("precision", ""))),
        ("attention", lambda s: str(s.counts.get("attention", ""))),
        ("code", lambda s: "the model's own (trust_remote_code)" if s.order.how.get("trust_remote_code") else ""),
        ("processes", lambda s: f"{s.order.how.get('processes', 1)}, {wrapper_text(s.counts.get('wrapper'))}"),
    ]
    rows = [[name, *(read(stage) for stage in run.trained)] for name, read in facts]
    rows = [row for row in rows if any(row[1:])]
    return Table(["", *(TITLES[stage.name] for stage in run.trained)], rows)


def mix_table(stage: StageRecord) -> Table | None:
    """Share asked for and achieved, by source."""
    mix = stage.json("mix.json")
    if not mix:
        return None
    windows = mix.get("windows", {})
    rows = []
    for name, source in mix["sources"].items():
        off = signed((source["achieved"] - source["asked"]) * 100, 3)
        window = percentage_points(windows.get("largest_deviation", {}).get(name))
        rows.append([name, source["role"], percent(source["asked"]), percent(source["achieved"]), f"{off} pp", window,
                     number(source["tokens"]), number(source["epochs"], digits=2)])  # fmt: skip
    header = ["source", "part", "asked", "achieved", "off by", "at most, in a window", "tokens", "epochs"]
    caption = f"share of tokens; a window is any {number(windows.get('rows'))} consecutive rows"
    return Table(header, rows, 2, f"{TITLES[short(stage)]}: mix", caption)


def ledger_table(stage: StageRecord) -> Table | None:
    """Where every token of every source went; the signs add up."""
    ledger = stage.json("ledger.json")
    if not ledger:
        return None
    accounts = {**ledger["sources"], "total": ledger["total"]}
    rows: list[list[str | Cell]] = []
    for label, path in ledger_lines(ledger["total"]):
        tokens = [look_up(account, path, "tokens") for account in accounts.values()]
        documents = look_up(ledger["total"], path, "documents")
        if any(tokens) or documents:
            tone: Tone = "strong" if label.startswith("=") else ""
            rows.append([Cell(label, tone), *(Cell(number(value), tone) for value in tokens), number(documents)])
    said = ["it balances to the token" if ledger.get("balanced") else "it does NOT balance", *drop_examples(ledger)]
    title = f"{TITLES[short(stage)]}: ledger"
    return Table(["tokens", *accounts, "documents"], rows, title=title, caption="; ".join(said))


def ledger_lines(total: dict[str, Any]) -> list[tuple[str, tuple[str, ...]]]:
    """The ledger's lines, as they are read from top to bottom, each with the way to its numbers."""
    dropped = [(f"\u2212 {reason}", ("dropped", reason)) for reason in total.get("dropped", {})]
    return [
        ("read", ("read",)),
        ("\u2212 duplicate", ("duplicate",)),
        *dropped,
        ("= kept", ("kept",)),
        ("\u2212 cut off, too long for a row", ("truncated",)),
        ("\u2212 not needed for the budget", ("unused",)),
        ("+ repeated", ("repeated",)),
        ("= packed and trained", ("packed",)),
        ("of it, in split documents", ("split",)),
        ("of it, carries loss", ("supervised",)),
    ]


def look_up(account: dict[str, Any], path: tuple[str, ...], unit: str) -> int | None:
    """The number at the end of a way through nested mappings; None when a source has no such line."""
    found: Any = account
    for name in (*path, unit):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def drop_examples(ledger: dict[str, Any]) -> list[str]:
    """Where something was dropped first, for every source and reason."""
    return [f"{name}, {reason}: {where}" for name, lines in ledger["sources"].items()
            for reason, where in (lines.get("examples") or {}).items()]  # fmt: skip


def recipe_table(run: RunRecord) -> Table:
    """The settings that define the training stages."""
    data = {stage.name: run.stages[f"prepare_{stage.name}"].order.what for stage in run.trained
            if f"prepare_{stage.name}" in run.stages}  # fmt: skip
    rows: list[list[str]] = []
    for stage in run.trained:
        prepared, what = data.get(stage.name, {}), stage.order.what
        settings = {name: prepared[name] for name in DATA_RECIPE if prepared.get(name) is not None}
        settings |= {f"{part}: {name}": percent(share, digits=1) for part in ("mix", "replay")
                     for name, share in prepared.get(part, {}).items()}  # fmt: skip
        settings |= {name: what[name] for name in RECIPE if what.get(name) is not None}
        for name, value in settings.items():
            row = next((row for row in rows if row[0] == name), None) or _new_row(rows, name, len(run.trained))
            row[1 + run.trained.index(stage)] = setting(value)
    return Table(["setting", *(TITLES[stage.name] for stage in run.trained)], rows)


def timings_table(run: RunRecord) -> Table:
    """Seconds of every stage, and when and where it finished."""
    rows: list[list[str | Cell]] = []
    for name, stage in run.stages.items():
        how = stage.artifact.get("how", {})
        rows.append([name, clock(stage.artifact["seconds"]), str(how.get("tag", "")), stage.artifact["finished_at"],
                     str(stage.artifact.get("commit") or "none")])  # fmt: skip
    total = sum(stage.artifact["seconds"] for stage in run.stages.values())
    rows.append([Cell("total", "strong"), Cell(clock(total), "strong"), "", "", ""])
    return Table(["stage", "time", "hardware", "finished (UTC)", "commit"], rows)


def versions_table(run: RunRecord) -> Table:
    """Versions of what computed; a package that stages disagree on is listed with all its versions."""
    found: dict[str, set[str]] = {}
    for stage in run.stages.values():
        for package, version in {"python": stage.artifact.get("python", ""), **stage.artifact["versions"]}.items():
            found.setdefault(package, set()).add(str(version))
    return Table(
        ["package", "version"], [[package, ", ".join(sorted(versions))] for package, versions in found.items()]
    )


def hardware_table(run: RunRecord) -> Table:
    """The hardware row that stages ran with; stages with the same one share a line."""
    stages: dict[str, list[str]] = {}
    for name, stage in run.stages.items():
        how = {key: value for key, value in stage.artifact.get("how", {}).items() if key not in HOW_NOT_SHOWN}
        stages.setdefault(", ".join(f"{key} {setting(value)}" for key, value in how.items()), []).append(name)
    return Table(["hardware", "stages"], [[how, listed(names)] for how, names in stages.items()], 2, style="fine")


def lineage_table(run: RunRecord) -> Table:
    """Each stage's directory, what it reads, and the files behind it."""
    rows = []
    for name, stage in run.stages.items():
        reads = [f"{role}: {path}" for role, path in stage.order.inputs.items()]
        rows.append([name, stage.directory.name, "\n".join(reads), "\n".join(files_read(stage.order.what))])
    return Table(["stage", "directory", "reads", "files and their digests"], rows, num_text_columns=4, style="fine")


def files_read(what: dict[str, Any]) -> list[str]:
    """The files of an order with their digests, the first few of each source; datasets of the hub with their commit."""
    lines: list[str] = []
    for source, said in [*what.get("sources", {}).items(), ("", {"files": what.get("files", [])})]:
        if hub := said.get("hf"):
            lines.append(f"{source}: {hub['id']} at {hub['revision']}")
        files = said.get("files", [])
        shown = [f"{file['sha256'][:SHORT_DIGEST]} {file['path']}" for file in files[:FILES_A_SOURCE]]
        lines += [f"{source}: {line}" if source else line for line in shown]
        lines += [f"and {len(files) - len(shown):,} more"] if len(files) > len(shown) else []
    return lines


def short(stage: StageRecord) -> str:
    """`cpt` of `prepare_cpt`."""
    return stage.name.removeprefix("prepare_")


def _new_row(rows: list[list[str]], name: str, num_stages: int) -> list[str]:
    rows.append([name, *([""] * num_stages)])
    return rows[-1]
