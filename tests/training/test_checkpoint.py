"""Checkpoints: published whole, rotated, and skipped when damaged."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.training import checkpoint


def write(directory: Path, step: int, keep_last: int = 2) -> Path:
    folder = checkpoint.writing_folder(directory) / f"checkpoint-{step}"
    (folder / "shards").mkdir(parents=True)
    (folder / "shards" / "rank0").write_bytes(bytes(range(256)) * 8)
    (folder / "state.json").write_text(str(step))
    return checkpoint.publish(directory, step, keep_last)


def test_only_the_last_ones_are_kept_and_nothing_is_left_aside(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        write(tmp_path, step)
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path)] == [100, 10]
    assert not checkpoint.writing_folder(tmp_path).exists()
    assert checkpoint.newest_whole(tmp_path) == checkpoint.list_checkpoints(tmp_path)[0]


ROTTEN = {  # harm -> what digests.json holds in place of what was written
    "a key": ('"bytes"', '"bxtes"'),
    "a name": ('"state.json"', '"../state.json"'),
    "an entry": ('"shards/rank0": {', '"shards/rank0": 7, "more": {'),
    "a list": (None, "[1, 2]"),
    "nothing": (None, ""),
}


@pytest.mark.parametrize("harm", ["truncated", "changed", "missing", "no digests", "unreadable", *ROTTEN])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    older, newest = write(tmp_path, 10), write(tmp_path, 20)
    shard = newest / "shards" / "rank0"
    if harm == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif harm == "changed":
        shard.write_bytes(b"\xff" + shard.read_bytes()[1:])
    elif harm == "missing":
        shard.unlink()
    elif harm == "no digests":
        (newest / checkpoint.DIGESTS).unlink()
    elif harm == "unreadable":
        read = checkpoint.file_sha256

        def refuse(path: Path) -> str:
            if path == shard:
                raise OSError(errno.EIO, "Input/output error", str(path))
            return read(path)

        monkeypatch.setattr(checkpoint, "file_sha256", refuse)
    else:
        digests, (before, after) = newest / checkpoint.DIGESTS, ROTTEN[harm]
        digests.write_text(digests.read_text().replace(before, after, 1) if before else after)
        (newest.parent / "state.json").write_text("20")  # what "a name" points at is a file of that size
    assert checkpoint.newest_whole(tmp_path) == older
    said = capsys.readouterr().out
    assert "step 20 is damaged" in said and "falling back" in said


def test_a_checkpoint_is_on_the_disk_before_an_older_one_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut leaves: content and names that were synced, and no more."""
    older = write(tmp_path, 10)
    deeds: list[tuple[str, Path]] = []

    def noting(deed: str, do: Callable[..., Any], path_of: Callable[..., Path]) -> Callable[..., Any]:
        def done(*arguments: Any, **named: Any) -> Any:
            deeds.append((deed, path_of(arguments[0])))
            return do(*arguments, **named)

        return done

    monkeypatch.setattr(
        os, "fsync", noting("sync", os.fsync, lambda number: Path(f"/proc/self/fd/{number}").readlink())
    )
    monkeypatch.setattr(os, "rename", noting("rename", os.rename, Path))
    monkeypatch.setattr(shutil, "rmtree", noting("remove", shutil.rmtree, Path))
    made = write(tmp_path, 20, keep_last=1)
    written = checkpoint.written_folder(tmp_path, 20)
    renamed, removed = deeds.index(("rename", written)), deeds.index(("remove", older))
    synced = {path for deed, path in deeds[:renamed] if deed == "sync"}
    assert {written / path.relative_to(made) for path in [made, *made.rglob("*")]} <= synced
    assert {made / "shards" / "rank0", made / checkpoint.DIGESTS} <= set(made.rglob("*"))
    assert tmp_path in synced, "the name of the folder of all checkpoints"
    assert ("sync", made.parent) in deeds[renamed:removed]
    assert not [path for deed, path in deeds[:removed] if deed == "remove" and path != written.parent]


def test_a_save_that_was_cut_off_is_no_checkpoint(tmp_path: Path) -> None:
    unfinished = checkpoint.writing_folder(tmp_path) / "checkpoint-30"
    unfinished.mkdir(parents=True)
    (unfinished / "model.safetensors").write_bytes(b"half")
    assert checkpoint.newest_whole(tmp_path) is None
    checkpoint.clear_unfinished(tmp_path)
    assert not checkpoint.writing_folder(tmp_path).exists()


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path: Path) -> None:
    newest = write(tmp_path, 20)
    (newest / "state.json").unlink()
    assert checkpoint.newest_whole(tmp_path) is None
    assert write(tmp_path, 20) == newest
    assert checkpoint.newest_whole(tmp_path) == newest


def test_damaged_ones_do_not_push_out_the_good_ones_before_their_step(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write(tmp_path, step, keep_last=3)
    for newer in checkpoint.list_checkpoints(tmp_path)[:2]:
        (newer / "state.json").unlink()
    assert checkpoint.newest_whole(tmp_path) == checkpoint.list_checkpoints(tmp_path)[0]
    made = write(tmp_path, 12, keep_last=1)
    assert checkpoint.list_checkpoints(tmp_path) == [made] and checkpoint.newest_whole(tmp_path) == made
