"""Worker `prepare`: `python -m tasks.preparation DIR` reads DIR/order.json and leaves packed rows in DIR.

    read, clean, tokenize (a pool) -> spill to disk -> duplicates -> mix -> pack -> order -> rows.arrow, ledger.json

Everything is made in DIR/work and renamed at the end, so a killed run leaves nothing and the next one starts over.
The output is a pure function of the order's `what` and the files: the same bytes for any number of processes.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from tasks.config import locate
from tasks.digests import check_unchanged
from tasks.disk import writes_told
from tasks.errors import EXIT_USER_ERROR, UserError
from tasks.preparation.corpus import Corpus, read_corpus, say_drops, say_truncated, truncated, usable
from tasks.preparation.examples import examples
from tasks.preparation.layout import lay_out
from tasks.preparation.ledger import balance, count_read, source_ledger
from tasks.preparation.mix import Draws, mix
from tasks.preparation.rows import Written, write_rows
from tasks.preparation.shares import describe_mix
from tasks.preparation.sources import SourcePlan, check_files, plan_sources
from tasks.preparation.tokenizer import copy_tokenizer, end_of_turn, load_backend, settle
from tasks.progress import Progress, say
from tasks.stage import ERROR, Order, finish, is_done, leave_error, read_order, stage_lock, write_json
from tasks.trust import declare

# Names of sources may hold dots.
KEY = re.compile(r"(mix|replay|sources|model)\.(.+?)(?:\.(files|hf))?( \(.*\))?")
OUTPUTS = ("rows.arrow", "ledger.json", "mix.json", "examples.json", "tokenizer")


def main(directory: Path) -> int:
    """Run the stage in `directory`; the exit code."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        with writes_told(directory), stage_lock(directory, on_wait=lambda holder: say(f"prepare waits for {holder}")):
            if is_done(directory):
                return 0
            began, order = time.monotonic(), read_order(directory)
            (directory / ERROR).unlink(missing_ok=True)
            with_work(directory, order, began)
    except UserError as error:
        leave_error(directory, error)
        return EXIT_USER_ERROR
    return 0


def with_work(directory: Path, order: Order, began: float) -> None:
    """Prepare in a folder aside, then put the outputs into place."""
    work = directory / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        counts = prepare(order, work)
        for output in OUTPUTS:
            _replace(work / output, directory / output)
    except UserError as error:
        raise UserError(
            error.what, where=in_config(error.where, order), allowed=error.allowed, todo=error.todo
        ) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    finish(directory, OUTPUTS, counts, time.monotonic() - began)


def in_config(where: str, order: Order) -> str:
    """A key that an error names, `mix.docs`, with file, line and stage; anything else, as a file of data, as it is."""
    found = KEY.fullmatch(where)
    if not found:
        return where
    section, name, below, rest = found.groups()
    keys = [section, name, *([below] if below else [])]
    keys = [order.what["stage"], *keys] if section in ("mix", "replay") else keys
    try:
        return locate(Path(order.how["config"]), *keys) + (rest or "")
    except (KeyError, UserError):  # an order that was written by hand, or a file that is gone by now
        return ".".join(keys) + (rest or "")


def prepare(order: Order, work: Path) -> dict[str, Any]:
    """Make all outputs in `work`; returns the artifact's counts."""
    what = order.what
    declare(order)
    plans = plan_sources(what)
    check_files(plans)
    check_unchanged(order, work.parent.parent)
    copy_tokenizer(order.inputs["model"], work / "tokenizer")
    settled = settle(work / "tokenizer", what, has_chats=any(plan.is_chat for plan in plans))
    try:
        corpus = read_corpus(plans, settled, what, order.how.get("processes") or num_cores(), work)
    except Exception:  # it may be one that somebody replaced, cut off or deleted while we read it: then say that
        check_unchanged(order, work.parent.parent)
        raise
    check_unchanged(order, work.parent.parent)
    left = [usable(corpus, number, plan, what["seq_len"]) for number, plan in enumerate(plans)]
    draws = mix(plans, [lengths for _, lengths in left], [numbers for numbers, _ in left], what)
    say_repeats(plans, draws)
    layout, num_pieces = lay_out(corpus, draws, what["seq_len"], what["seed"])
    progress = Progress("prepare", "row", int(layout.row[-1]) + 1)
    written = write_rows(
        work / "rows.arrow", corpus.tokens, layout, len(plans),
        lambda rows, tokens: progress.update(rows, **{"": progress.speed(tokens)}),
    )  # fmt: skip
    ledger = make_ledger(plans, corpus, draws, num_pieces, left, written)
    described = describe_mix(plans, draws, written)
    tokenizer = load_backend(settled)
    write_json(work / "ledger.json", ledger)
    write_json(work / "mix.json", described)
    write_json(work / "examples.json", examples(plans, draws, corpus.index, corpus.tokens, corpus.files, tokenizer))
    return {
        "rows": written.num_rows,
        "tokens": int(written.tokens.sum()),
        "supervised_tokens": int(written.supervised.sum()),
        "fill": int(written.tokens.sum()) / (written.num_rows * what["seq_len"]),
        "sources": [plan.name for plan in plans],
        "epochs": {plan.name: one.epochs for plan, one in zip(plans, draws, strict=True)},
        "added_tokens": [token for token, _ in settled.added_tokens],
        "eos": {"token": settled.eos, "id": settled.eos_id},
        "end_of_turn": end_of_turn(settled),
    }


def make_ledger(
    plans: list[SourcePlan], corpus: Corpus, draws: list[Draws], num_pieces: list[np.ndarray],
    left: list[tuple[np.ndarray, np.ndarray]], written: Written,
) -> dict[str, Any]:  # fmt: skip
    """The ledger of all sources, balanced."""
    counts = count_read(corpus.index, len(plans))
    say_drops(plans, corpus, counts)
    lines, supervised = {}, {}
    for number, (plan, one) in enumerate(zip(plans, draws, strict=True)):
        cut_off = truncated(corpus, *left[number])
        say_truncated(plan, cut_off, len(left[number][0]))
        lines[plan.name] = source_ledger(counts[number], one, cut_off, num_pieces[number],
                                         int(written.tokens[number]), int(written.supervised[number]))  # fmt: skip
        lines[plan.name]["examples"] = corpus.drop_examples[number]
        # A piece's first token has nothing before it, so it is not trained on; a chat's first never is.
        by_document = corpus.index["supervised"][one.documents].sum(dtype=np.int64)
        supervised[plan.name] = int(by_document if plan.is_chat else one.tokens - num_pieces[number].sum())
    return balance(lines, supervised)


def say_repeats(plans: list[SourcePlan], draws: list[Draws]) -> None:
    """Announce every source that repeats."""
    for plan, one in zip(plans, draws, strict=True):
        repeats = f", so it repeats: {one.epochs:.2f} epochs" if one.epochs > 1 else ""
        say(f"{'prepare':<14}{plan.name}: {one.tokens:,} tokens, {one.epochs:.2f} of what it has{repeats}")


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _replace(source: Path, target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    source.replace(target)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
