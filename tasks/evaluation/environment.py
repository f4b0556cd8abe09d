"""What has to stand in the environment before the first import of a Hugging Face library."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path

from tasks.stage import Order

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
# A bar has no line of its own: whatever is said beside it would be glued to it in the log.
QUIET = {"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}


def set_environment(order: Order, cache: str) -> None:
    """Offline, with a cache of its own, when every task stands in `include_path`.

    The cache of a local data file is keyed by its time of change and outlives a run; a fresh one is never stale. A task
    of lm-eval itself may need data of the hub: then the launcher decides, and the user's cache is kept.
    """
    os.environ.update(QUIET)
    if set(task_names(order)) <= names_in(include_path(order)):
        os.environ.update(OFFLINE | {"HF_DATASETS_CACHE": cache})


def task_names(order: Order) -> list[str]:
    """Every task once, in the order of the run's file."""
    return list(dict.fromkeys(name for side in order.what["tasks"].values() for name in side))


def include_path(order: Order) -> Path:
    """The folder of the run's own tasks."""
    return Path(order.inputs["include_path"])


def names_in(folder: Path) -> set[str]:
    """Names of tasks and groups that a folder's files define, read as text: lm-eval need not be imported for it."""
    texts = [text.decode(errors="replace") for text in _texts(folder)]
    return {name for text in texts for name in re.findall(r"^(?:task|group): *['\"]?([^\s'\"#]+)", text, re.MULTILINE)}


def lm_eval_tasks() -> Path | None:
    """The folder of lm-eval's own tasks, found without importing it (6 s); None where it is not installed."""
    found = importlib.util.find_spec("lm_eval")
    return Path(found.origin).parent / "tasks" if found and found.origin else None


def unknown_to_lm_eval(names: list[str]) -> list[str]:
    """The names that stand nowhere in lm-eval's files, so are no tasks, groups or tags of its own. Takes 0.4 s.

    Its index, which takes 10 s, knows for certain; most names that it does not know are typos, and found here.
    """
    folder, left = lm_eval_tasks(), list(dict.fromkeys(names))
    if folder is None:
        return []
    patterns = {name: re.compile(rb"(?<![\w-])" + re.escape(name.encode()) + rb"(?![\w-])") for name in left}
    for text in _texts(folder) if left else ():
        left = [name for name in left if not (name.encode() in text and patterns[name].search(text))]
    return left


def _texts(folder: Path) -> Iterator[bytes]:
    for root, _, files in os.walk(folder):
        for name in files:
            if name.endswith(".yaml"):
                yield Path(root, name).read_bytes()
