"""The corpus: every source read, cleaned, tokenized, spilled to disk, without duplicates and with overflow settled."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tasks.errors import UserError
from tasks.preparation.clean import DUPLICATE, OK, OVERFLOW, REASONS, UNSUPERVISED
from tasks.preparation.dedup import mark_duplicates
from tasks.preparation.encode import Encoded
from tasks.preparation.examples import pieces
from tasks.preparation.pool import POOL_FROM_BYTES, encode_all
from tasks.preparation.sources import SourcePlan, all_files, read_blocks, total_bytes
from tasks.preparation.spill import Spill, chunks, forget
from tasks.preparation.tokenizer import Settled, load_backend
from tasks.progress import Progress, say

MEGABYTE = 1_000_000
SHOWN_TOKENS = 200  # of the example in an error


@dataclass(frozen=True)
class Corpus:
    """All documents. `index` has an entry a record read; `tokens` their ids."""

    files: list[str]
    tokens: np.ndarray
    index: np.ndarray
    drop_examples: list[dict[str, str]]  # a source: reason -> file:line

    def where(self, number: int) -> str:
        """File and line of a document."""
        return f"{self.files[self.index['file'][number]]}:{self.index['line'][number]}"


@dataclass
class Found:
    """What one source held."""

    read: int = 0
    kept: int = 0
    with_input: int = 0
    with_crlf: int = 0
    fields: list[str] = field(default_factory=list)  # of its first record

    def add(self, encoded: Encoded) -> None:
        """Count a block."""
        self.read += len(encoded.status)
        self.kept += int(np.count_nonzero(encoded.status == OK))
        self.with_input += encoded.num_with_input
        self.with_crlf += encoded.num_with_crlf
        self.fields = self.fields or encoded.fields


def read_corpus(plans: list[SourcePlan], settled: Settled, what: dict[str, Any], processes: int, work: Path) -> Corpus:
    """Read all sources once; the result does not depend on `processes`."""
    files = all_files(plans)
    tokens, index = _encode_and_spill(plans, settled, what, processes, work, files)
    say(f"{'prepare':<14}looks for duplicates among {len(index):,} documents")
    duplicates = mark_duplicates(index)
    corpus = Corpus(files, tokens, index, [{} for _ in plans])
    _settle_overflow(plans, index, what)
    _check_masks(plans, corpus, settled, what["seq_len"])
    _note_examples(corpus, duplicates)
    return corpus


def usable(corpus: Corpus, source: int, plan: SourcePlan, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """(document numbers, tokens of each that may be used) of what a source has left."""
    index, found = corpus.index, []
    for part in chunks(len(index)):
        found.append(np.flatnonzero((index["status"][part] == OK) & (index["source"][part] == source)) + part.start)
    numbers = np.concatenate(found)
    lengths = index["length"][numbers]
    forget(corpus.index)
    return numbers, (np.minimum(lengths, seq_len) if plan.is_chat else lengths)


def truncated(corpus: Corpus, numbers: np.ndarray, usable_tokens: np.ndarray) -> dict[str, int]:
    """How many of a source's documents are cut to what may be used of them, and the tokens that this leaves out."""
    cut_off = corpus.index["length"][numbers] - usable_tokens
    forget(corpus.index)
    return {"documents": int(np.count_nonzero(cut_off)), "tokens": int(cut_off.sum(dtype=np.int64))}


def _encode_and_spill(
    plans: list[SourcePlan], settled: Settled, what: dict[str, Any], processes: int, work: Path, files: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    spill, progress = Spill(work), Progress("prepare", "read MB", max(1, total_bytes(plans) // MEGABYTE))
    if total_bytes(plans) < POOL_FROM_BYTES and not any(plan.hub for plan in plans):
        processes = 1
    found = [Found() for _ in plans]
    bytes_before, file, file_bytes = 0, 0, 0
    for encoded in encode_all(read_blocks(plans), settled, plans, what["seq_len"], processes):
        if encoded.file != file:
            bytes_before, file = bytes_before + file_bytes, encoded.file
        file_bytes = encoded.block_bytes_read
        _refuse_overflow(plans[encoded.source], encoded, what, files[encoded.file])
        spill.append(encoded)
        found[encoded.source].add(encoded)
        done = min((bytes_before + file_bytes) // MEGABYTE, progress.total - 1)  # the end is said once, below
        _say_progress(progress, done, spill)
    _say_progress(progress, progress.total, spill)
    for plan, one in zip(plans, found, strict=True):
        _refuse_empty(plan, one)
        _refuse_missing_input(plan, one)
        _say_crlf(plan, one)
    return spill.close()


def _say_progress(progress: Progress, done: int, spill: Spill) -> None:
    speed = progress.speed(spill.num_tokens)
    progress.update(done, tokens=f"{spill.num_tokens:,}", documents=f"{spill.num_documents:,}", **{"": speed})


def _refuse_empty(plan: SourcePlan, found: Found) -> None:
    if not found.read:
        raise UserError(f"the source '{plan.name}' holds no record", where=_where(plan),
                        todo="check the file, or the glob")  # fmt: skip
    if not found.kept:
        raise UserError(f"nothing is left of the source '{plan.name}': all {found.read:,} records are empty or short",
                        where=_where(plan), allowed=f"documents of at least min_chars = {plan.min_chars} characters",
                        todo="lower `min_chars`, or check the field mapping")  # fmt: skip


def _refuse_missing_input(plan: SourcePlan, found: Found) -> None:
    """Some records may lack it, since many sets leave out an empty one; if all do, it has another name."""
    if "input" in plan.fields and not found.with_input:
        raise UserError(f"no record of the source '{plan.name}' has the field '{plan.fields['input']}'",
                        where=_where(plan), allowed=f"the fields of its first record: {', '.join(found.fields)}",
                        todo="correct `input`, or leave it out")  # fmt: skip


def _say_crlf(plan: SourcePlan, found: Found) -> None:
    """Other text holds none, so the model learns to end its lines in two ways; one document may well speak of them."""
    if found.with_crlf > 1:
        say(f"{'prepare':<14}{plan.name}: {found.with_crlf:,} of {found.kept:,} documents hold Windows line ends "
            "(\\r\\n), trained on as they are")  # fmt: skip


def _where(plan: SourcePlan) -> str:
    return f"sources.{plan.name}" + (f" ({plan.files[0][0]})" if plan.files else "")


def _refuse_overflow(plan: SourcePlan, encoded: Encoded, what: dict[str, Any], path: str) -> None:
    if not plan.is_chat or what["overflow"] != "error":
        return
    too_long = np.flatnonzero((encoded.lengths > what["seq_len"]) & (encoded.status == OK))
    if len(too_long):
        first = too_long[0]
        raise UserError(f"the conversation has {encoded.lengths[first]:,} tokens, a row {what['seq_len']:,}",
                        where=f"{path}:{encoded.lines[first]}", allowed="overflow: error | drop | truncate",
                        todo="set `overflow: drop` or `truncate`, or raise `model.seq_len`")  # fmt: skip


def _settle_overflow(plans: list[SourcePlan], index: np.ndarray, what: dict[str, Any]) -> None:
    chats = np.array([plan.is_chat for plan in plans])
    for part in chunks(len(index)):
        rows = index[part]
        long = (rows["status"] == OK) & chats[rows["source"]] & (rows["length"] > what["seq_len"])
        if what["overflow"] == "drop":
            rows["status"][long] = OVERFLOW
        else:  # truncated; useless when the answer is what was cut
            rows["status"][long & (rows["supervised"] == 0)] = UNSUPERVISED
    for number, plan in enumerate(plans):
        mine = index["source"] == number
        if not np.any(mine & (index["status"] == OK)):
            duplicate = bool(np.any(mine & (index["status"] == DUPLICATE)))
            raise UserError(
                f"nothing is left of the source '{plan.name}'",
                where=f"sources.{plan.name}",
                todo="all of it is a duplicate of other sources: leave one of them out"
                if duplicate
                else "all conversations overflow: raise `model.seq_len`, or set `overflow: truncate`",
            )


def _check_masks(plans: list[SourcePlan], corpus: Corpus, settled: Settled, seq_len: int) -> None:
    """A mask that is all zero or all one over a source means that template and data do not fit."""
    index = corpus.index
    for number, plan in enumerate(plans):
        if not plan.is_chat:
            continue
        mine = np.flatnonzero((index["source"] == number) & (index["status"] == OK))
        supervised = int(index["supervised"][mine].sum(dtype=np.int64))
        within = np.minimum(index["length"][mine], seq_len) - 1  # the first token is never trained on
        if 0 < supervised < int(within.sum(dtype=np.int64)):
            continue
        first = index[mine[0]]
        ids = corpus.tokens[first["offset"] : first["offset"] + first["length"]]
        shown = pieces(ids[:SHOWN_TOKENS], load_backend(settled))
        text = "".join(f"[[{piece['text']}]]" if piece["trained"] else piece["text"] for piece in shown)
        raise UserError(f"{'every' if supervised else 'no'} token of the chats in '{plan.name}' is trained on",
                        where=f"{corpus.where(int(mine[0]))}, rendered ([[trained]]): {text!r}",
                        allowed="loss on the assistant's turns only",
                        todo="correct the {% generation %} marks of the chat template")  # fmt: skip


def _note_examples(corpus: Corpus, duplicates: dict[int, tuple[int, int]]) -> None:
    index = corpus.index
    for part in chunks(len(index)):
        dropped = np.flatnonzero((index["status"][part] != OK) & (index["status"][part] != DUPLICATE)) + part.start
        pairs, firsts = np.unique(index[["source", "status"]][dropped], return_index=True)
        for (source, status), first in zip(pairs.tolist(), firsts.tolist(), strict=True):
            corpus.drop_examples[source].setdefault(REASONS[status], corpus.where(int(dropped[first])))
    for source, (number, first_copy) in duplicates.items():
        corpus.drop_examples[source]["duplicate"] = f"{corpus.where(number)} (first at {corpus.where(first_copy)})"


def say_drops(plans: list[SourcePlan], corpus: Corpus, counts: np.ndarray) -> None:
    """One line a source and reason of what was dropped."""
    for number, plan in enumerate(plans):
        for status, reason in REASONS.items():
            if documents := int(counts[number, status, 0]):
                example = corpus.drop_examples[number].get(reason, "")
                say(f"{'prepare':<14}{plan.name}: {documents:,} dropped as {reason}, e.g. {example}")


def say_truncated(plan: SourcePlan, cut_off: dict[str, int], documents: int) -> None:
    """One line for a source whose conversations `overflow: truncate` cuts: they teach no end of turn."""
    if cut_off["documents"]:
        say(f"{'prepare':<14}{plan.name}: {cut_off['documents']:,} of {documents:,} conversations are longer than a "
            f"row and cut, so they have no end of turn; {cut_off['tokens']:,} tokens left out")  # fmt: skip
