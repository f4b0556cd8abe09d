"""What has to stand in the environment before the first import of a Hugging Face library."""

from __future__ import annotations

import os
import re
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
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in folder.rglob("*.yaml")]
    return {name for text in texts for name in re.findall(r"^(?:task|group): *['\"]?([^\s'\"#]+)", text, re.MULTILINE)}
