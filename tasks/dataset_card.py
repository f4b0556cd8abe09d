"""What a data set's card says of its files: `datasets` reads any path that it names, also one outside the data set.

A local folder's card is checked before anything is loaded. Of a data set of the hub it is checked which files were
resolved, before the first is read (`tasks/preparation/sources.py`). lm-eval loads its tasks' data of the hub by itself:
the cards of those are not checked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import yaml

from tasks.errors import UserError
from tasks.task_yaml import below, texts

CARDS = ("README.md", ".huggingface.yaml")
FRONT_MATTER = re.compile(r"^\s*---[\r\n]+([\S\s]*?)[\r\n]+---(?:\r\n|\n|$)")  # as huggingface_hub finds it
LOCAL_SCHEME = re.compile(r"^(file|local):")


def check_card(folder: Path) -> None:
    """Raise `UserError` for a card of a local folder that names files outside of it."""
    for card in [folder / name for name in CARDS if (folder / name).is_file()]:
        for name in _files_named(card):
            if name.startswith(("/", "~")) or ".." in Path(name).parts or ":" in name:
                raise UserError(f"the card of the data set names {name}, which is not in its folder", where=str(card),
                                allowed="paths relative to the folder, without `..`",
                                todo="correct `data_files`, or remove the card")  # fmt: skip


def strays(files: Iterable[str], dataset: str) -> list[str]:
    """Those of a data set's resolved files that lie on this machine, and not in the data set's own local folder."""
    own = Path(dataset).resolve() if Path(dataset).is_dir() else None
    found = []
    for file in files:
        last = file.split("::")[-1]
        local = "://" not in last or LOCAL_SCHEME.match(last)
        if local and not (own and Path(last).resolve().is_relative_to(own)):
            found.append(file)
    return found


def _files_named(card: Path) -> list[str]:
    try:
        text = card.read_text(encoding="utf-8")
        if card.suffix == ".md":
            front = FRONT_MATTER.search(text)
            text = front[1] if front else ""
        said = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"the card of the data set is not readable: {error}", where=str(card)) from None
    return [text for value in below(said, ("data_files", "data_dir")) for text in texts(value)]
