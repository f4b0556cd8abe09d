"""Digests of files: remembered between runs, and held against the disk while a stage is computed.

A stage's key says which files it was computed from. Between the plan and their use somebody may replace one, so a
worker looks at all that its order names before it begins and before it finishes. They are cached in
`runs/.digests.json` by path, size and time of change: a corpus or a model is read for its digest once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from tasks.errors import UserError
from tasks.stage import Order, file_sha256, write_text

HEX_DIGITS = 64  # of a digest; what else identifies an input, a hub's commit or a stage's key, is shorter


class Digests:
    """SHA-256 of files, remembered between runs."""

    def __init__(self, runs: Path) -> None:
        self.path = runs / ".digests.json"
        self.known: dict[str, list[Any]] = {}
        self.changed = False

    def __enter__(self) -> Digests:
        try:
            self.known = json.loads(self.path.read_text())
        except (FileNotFoundError, ValueError):  # a cache: without it the files are read again
            self.known = {}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.changed:
            with suppress(OSError):  # a plan can be asked for where nothing can be written
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_text(self.path, json.dumps(self.known))

    def of(self, path: Path) -> str:
        """The digest of a file."""
        stat, name = path.stat(), str(path)
        known = self.known.get(name)
        if known is None or known[:2] != [stat.st_size, stat.st_mtime_ns]:
            known = [stat.st_size, stat.st_mtime_ns, file_sha256(path)]
            self.known[name], self.changed = known, True
        return str(known[2])


def check_unchanged(order: Order, runs: Path) -> None:
    """Refuse files that are not what the order was made for: the stage's key says that they are.

    Called under the stage's lock, before the work and behind it. A file of known size and time of change is not read
    again for its digest.
    """
    with Digests(runs) as digests:
        for path, digest, where in files_named(order):
            try:
                problem = "changed" if digests.of(path) != digest else ""
            except OSError as error:
                problem = f"cannot be read any more ({error.strerror}): it changed"
            if problem:
                raise UserError(
                    f"{path} {problem} after this run was planned",
                    where=where,
                    todo="run again: the plan is made anew; with the old file back, this stage goes on. To add data "
                    "while runs go on, write aside and rename",
                )


def files_named(order: Order) -> Iterator[tuple[Path, str, str]]:
    """Every file of this disk that an order names: its path, its digest and the config's key behind it."""
    what = order.what
    for name, source in what.get("sources", {}).items():
        for file in source.get("files") or ():
            yield Path(file["path"]), file["sha256"], f"sources.{name}.files"
    if template := what.get("chat_template"):
        yield Path(template["path"]), template["sha256"], "model.chat_template"
    for file in what.get("files", ()):
        yield Path(file["path"]), file["sha256"], "evaluate.include_path"
    for role, folder in (("init", "init"), ("model", "model"), ("tokenizer", "model")):
        for name, said in what.get(role, {}).items():
            if isinstance(said, str) and len(said) == HEX_DIGITS:
                yield Path(order.inputs[folder]) / name, said, "model.path"
