"""Checkpoints: written aside, digested, renamed; the newest whole one is found again.

    checkpoints/checkpoint-00000040/    what the trainer saved, the metrics up to there, and digests.json
    checkpoints/.writing/               a save in progress; whatever is found there at start was cut off

A run that is killed at any moment, also while saving, finds the last complete checkpoint. A damaged one (a
file of another size or digest) is renamed aside, and said so.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tasks.progress import say
from tasks.stage import file_sha256, sync, write_json

FOLDER, WRITING, DIGESTS = "checkpoints", ".writing", "digests.json"
DAMAGED = "damaged-"  # before the name of one that was passed over; it goes when the stage is done
NAME = re.compile(r"checkpoint-(\d+)")
DIGEST_THREADS = 8  # a sharded checkpoint has a file a process; hashing frees the interpreter's lock


def writing_folder(directory: Path) -> Path:
    """Where the trainer writes; it adds its own `checkpoint-N` below."""
    return directory / FOLDER / WRITING


def written_folder(directory: Path, step: int) -> Path:
    """What the trainer writes of a step."""
    return writing_folder(directory) / f"checkpoint-{step}"


def clear_unfinished(directory: Path) -> None:
    """Remove what a killed save left, and the folder where it holds nothing else."""
    shutil.rmtree(writing_folder(directory), ignore_errors=True)
    with contextlib.suppress(OSError):  # not there, or not empty
        (directory / FOLDER).rmdir()


def publish(directory: Path, step: int, keep_last: int) -> Path:
    """Digest the written checkpoint, rename it into place, and remove the ones beyond `keep_last`.

    A power cut at any moment leaves a whole one: all of it is on the disk before its rename, and that before a removal.
    """
    written = written_folder(directory, step)
    write_json(written / DIGESTS, _digest(written))
    sync([file for file in written.rglob("*") if file.is_file()], directory)
    final = directory / FOLDER / f"checkpoint-{step:08d}"
    if final.exists():  # of a run by other means; ours resume from the newest one
        shutil.rmtree(final)
    written.rename(final)
    sync([], final.parent)
    clear_unfinished(directory)
    for old in list_checkpoints(directory)[keep_last:]:
        shutil.rmtree(old)
    return final


def newest_whole(directory: Path) -> Path | None:
    """The newest checkpoint whose files are as they were written; newer ones, which are not, are renamed aside.

    Left in place they would count among the last ones to keep, and push out the good ones that come before their step.
    """
    for checkpoint in list_checkpoints(directory):
        if not (problem := damage(checkpoint)):
            return checkpoint
        say(f"checkpoint of step {step_of(checkpoint)} is damaged ({problem}): falling back to the one before")
        aside = checkpoint.with_name(DAMAGED + checkpoint.name)
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)
    return None


def list_checkpoints(directory: Path) -> list[Path]:
    """Published checkpoints, newest first."""
    found = [path for path in (directory / FOLDER).glob("checkpoint-*") if NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The number of steps that a checkpoint stands behind."""
    match = NAME.fullmatch(checkpoint.name)
    assert match, checkpoint
    return int(match[1])


def damage(checkpoint: Path) -> str:
    """Empty when a checkpoint is whole, else what is wrong with it."""
    try:
        said = json.loads((checkpoint / DIGESTS).read_text())
    except (OSError, ValueError):
        return f"{DIGESTS} is missing or unreadable"
    try:
        return _difference(checkpoint, said)
    except OSError as error:  # a sector that cannot be read
        return f"{error.filename or 'a file'} cannot be read: {error.strerror}"
    except (LookupError, TypeError, AttributeError, ValueError):  # a bit that flipped in a name, a key or a bracket
        return f"{DIGESTS} says something else than it was written with"


def _difference(checkpoint: Path, said: dict[str, dict[str, str | int]]) -> str:
    for name, entry in said.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} holds {file.stat().st_size} bytes, not {entry['bytes']}"
    found = _digest(checkpoint)
    changed = [name for name in said if said[name] != found[name]]
    return f"{changed[0]} has another digest" if changed else ""


def _digest(folder: Path) -> dict[str, dict[str, str | int]]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != DIGESTS)
    with ThreadPoolExecutor(DIGEST_THREADS) as pool:
        digests = list(pool.map(file_sha256, files))
    return {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": digest}
        for file, digest in zip(files, digests, strict=True)
    }
