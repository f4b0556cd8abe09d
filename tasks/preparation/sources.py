"""Sources: what the order names, read as blocks of raw records in one fixed order.

Files are read here line by line and not through `datasets`, for two reasons: an error must name file and line, and
the reading must stay far cheaper than the tokenizing (a block of JSON lines is cut at a newline and parsed by a pool
process). Hub datasets stream through `datasets`. Nothing is read whole but a .txt or .md file, which is one document.

Sources come in a fixed order, `mix` by name, then `replay` by name, so that of a duplicate across sources `mix` keeps
its copy, and the order in which a YAML file happens to list them decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tasks.config import Source
from tasks.dataset_card import strays
from tasks.errors import UserError
from tasks.hub import cause_of, patiently
from tasks.preparation import readers
from tasks.preparation.readers import Located

BLOCK_BYTES = 1 << 20  # of JSON lines; 1 MiB is about 0.2 s of tokenizing
BLOCK_RECORDS = 512  # of records that are parsed here (csv, parquet, json, hub)
FIELDS = ("text", "messages", "prompt", "completion", "instruction", "input", "output", "conversations")


@dataclass(frozen=True)
class SourcePlan:
    """One source as the order describes it. `fields` maps a role (`text`, `messages`, ...) to the name of a field."""

    name: str
    role: Literal["mix", "replay"]
    share: float  # of all tokens of the stage
    kind: str
    fields: dict[str, str]
    min_chars: int
    files: tuple[tuple[str, int], ...]  # (path, bytes)
    hub: dict[str, Any] | None

    @property
    def is_chat(self) -> bool:
        """Whether the records are conversations."""
        return self.kind != "text"


@dataclass(frozen=True)
class Block:
    """Some records of one file: JSON lines as bytes, or records with their line numbers."""

    source: int
    file: int  # index into the list of all files, in reading order
    path: str
    first_line: int
    payload: bytes | list[Located]
    bytes_read: int  # of this file so far, on disk


def plan_sources(what: dict[str, Any]) -> list[SourcePlan]:
    """The sources of an order, `mix` first, each by name."""
    rest = 1.0 - sum(what["replay"].values())
    plans = []
    for role, shares, factor in (("mix", what["mix"], rest), ("replay", what["replay"], 1.0)):
        for name in sorted(shares):
            entry = what["sources"][name]
            spec = Source.model_validate(entry["spec"])
            files = tuple((file["path"], file["bytes"]) for file in entry.get("files") or ())
            fields = {field: getattr(spec, field) for field in FIELDS if getattr(spec, field) is not None}
            plans.append(SourcePlan(name, role, shares[name] * factor, spec.kind, fields,  # type: ignore[arg-type]
                                    spec.min_chars, tuple(sorted(files)), entry.get("hf")))  # fmt: skip
    return plans


def all_files(plans: list[SourcePlan]) -> list[str]:
    """Every file (or hub dataset) in reading order; a document's `file` is an index into it."""
    return [path for plan in plans for path in ([p for p, _ in plan.files] or [_hub_name(plan.hub)])]


def total_bytes(plans: list[SourcePlan]) -> int:
    """Bytes on disk of all files."""
    return sum(size for plan in plans for _, size in plan.files)


def check_files(plans: list[SourcePlan]) -> None:
    """Refuse, before anything is read, what cannot be read: no file, a gone or changed file, an unknown format."""
    for plan in plans:
        if not plan.files and not plan.hub:
            raise UserError(f"the source '{plan.name}' has no file", where=f"sources.{plan.name}.files",
                            todo="correct the glob; paths are relative to the project's root")  # fmt: skip
        for path, size in plan.files:
            readers.file_format(path, plan.is_chat)
            if not Path(path).is_file():
                raise UserError(f"no such file: {path}", where=f"sources.{plan.name}.files")
            if (now := Path(path).stat().st_size) != size:
                raise UserError(
                    f"{path} holds {now:,} bytes; it held {size:,} when this run was planned",
                    where=f"sources.{plan.name}.files",
                    todo="run again: the plan is made anew",
                )


def read_blocks(plans: list[SourcePlan]) -> Iterator[Block]:
    """All records of all sources in reading order."""
    file = 0
    for number, plan in enumerate(plans):
        if plan.hub:
            yield from _record_blocks(number, file, _hub_name(plan.hub), _read_hub(plan))
            file += 1
        for path, _ in plan.files:
            yield from _file_blocks(number, file, path, plan)
            file += 1


def _file_blocks(source: int, file: int, path: str, plan: SourcePlan) -> Iterator[Block]:
    kind = readers.file_format(path, plan.is_chat)
    if kind == "jsonl":
        for first_line, payload, done in readers.read_lines(path, BLOCK_BYTES):
            yield Block(source, file, path, first_line, payload, done)
    else:
        records = readers.read_records(path, kind, list(plan.fields.values()))
        yield from _record_blocks(source, file, path, records)


def _record_blocks(source: int, file: int, path: str, records: Iterator[tuple[Located, int]]) -> Iterator[Block]:
    pending: list[Located] = []
    chars, done = 0, 0
    for located, done in records:
        pending.append(located)
        chars += sum(len(value) for value in located[1].values() if isinstance(value, str))
        if len(pending) >= BLOCK_RECORDS or chars >= BLOCK_BYTES:
            yield Block(source, file, path, pending[0][0], pending, done)
            pending, chars = [], 0
    if pending:
        yield Block(source, file, path, pending[0][0], pending, done)


def _read_hub(plan: SourcePlan) -> Iterator[tuple[Located, int]]:
    assert plan.hub is not None
    hub = plan.hub
    number, fields = 0, plan.fields.values()
    try:
        rows = patiently(lambda: _open_hub(hub, f"sources.{plan.name}.hf"))
        for number, row in enumerate(rows, start=1):  # datasets itself asks again for what breaks off
            # As for Parquet: a row that lacks a field keeps the others.
            yield (number, {field: row[field] for field in fields} if row.keys() >= set(fields) else row), 0
    except UserError:
        raise
    except Exception as error:
        went = f"broke off behind record {number:,}" if number else "cannot be opened"
        raise UserError(
            f"the hub dataset {_hub_name(hub)} {went}: {cause_of(error)}",
            where=f"sources.{plan.name}.hf",
            todo="check id, subset, split, revision, and that the hub can be reached",
        ) from error


def _open_hub(hub: dict[str, Any], where: str) -> Iterable[dict[str, Any]]:
    """As `load_dataset(..., streaming=True)` opens it, with a look at its files before the first is read."""
    from datasets import load_dataset_builder  # 1.4 s to import, and few stages need it

    builder = load_dataset_builder(hub["id"], hub.get("subset"), revision=hub.get("revision"))
    named = [str(file) for files in (builder.config.data_files or {}).values() for file in files]
    if found := strays(named, hub["id"]):
        raise UserError(f"the card of the hub dataset {_hub_name(hub)} names a file of this machine: {found[0]}",
                        where=where, allowed="files of the dataset", todo="use another dataset")  # fmt: skip
    return builder.as_streaming_dataset(split=hub.get("split") or "train")  # type: ignore[no-any-return]


def _hub_name(hub: dict[str, Any] | None) -> str:
    if not hub:
        return ""
    parts = [hub["id"], hub.get("subset"), hub.get("split") or "train"]
    return ":".join(part for part in parts if part) + (f"@{hub['revision']}" if hub.get("revision") else "")
