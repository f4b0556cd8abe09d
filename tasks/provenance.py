"""Facts that go into every artifact: which code and which packages computed it."""

from __future__ import annotations

import os
import subprocess
from importlib import metadata
from pathlib import Path

# Those that decide what comes out.
PACKAGES = ("torch", "transformers", "trl", "datasets", "accelerate", "tokenizers", "lm-eval", "prefect", "pandas",
            "torchao", "unsloth", "unsloth_zoo")  # fmt: skip
COMMIT_VARIABLE = "STEEP_COMMIT"  # set in an image, which holds the code without its history


def git_commit() -> str | None:
    """The project's commit, with `+changes` when the tree differs from it; outside a repository what
    STEEP_COMMIT says, or None."""
    root = Path(__file__).resolve().parent.parent
    try:
        run = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+changes"]
        return subprocess.run(run, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return os.environ.get(COMMIT_VARIABLE) or None


def installed_versions() -> dict[str, str]:
    """Versions of the packages that decide what comes out."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
