"""The files of a model's folder, read so that a damaged one is told by its name. Loads no torch, no transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tasks.errors import UserError

HEADER_LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
LFS_POINTER = b"version https://git-lfs"
AGAIN = "copy or download the model again"


def read_model_json(path: Path, where: str) -> dict[str, Any]:
    """What a JSON file of a model says. Raises `UserError` for one that is damaged, or no mapping."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", where=where) from None
    except ValueError as error:
        raise UserError(f"{path} is damaged, or no JSON: {error}", where=where, todo=AGAIN) from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no fields, but {str(content)[:40]}", where=where, allowed="a JSON object",
                        todo=AGAIN)  # fmt: skip
    return content


def read_index(folder: Path, where: str) -> dict[str, str]:
    """Tensors and their files, as the index of a model in several files says; empty without one."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return {}
    files = read_model_json(index, where).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise UserError(f"{index} has no `weight_map` of tensors and files", where=where, todo=AGAIN)
    return files


def read_tensors(file: Path, where: str) -> dict[str, dict[str, Any]]:
    """The header of a safetensors file: dtype, shape and place of each tensor. Raises `UserError` for a damaged one."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(start := stream.read(HEADER_LENGTH_BYTES), "little")
            text = stream.read(min(length, MAX_HEADER_BYTES))
        size = file.stat().st_size
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}", where=where) from None
    if (start + text).startswith(LFS_POINTER):
        raise UserError(
            f"{file} is a git-lfs pointer, not the weights", where=where, todo="`git lfs pull` in its folder"
        )
    if length > MAX_HEADER_BYTES:
        raise UserError(f"{file} is no safetensors file", where=where, todo=AGAIN)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UserError(f"{file} is cut short, or no safetensors file", where=where, todo=AGAIN) from None
    if size != (whole := HEADER_LENGTH_BYTES + length + end):
        raise UserError(f"{file} holds {size:,} bytes, and by its header {whole:,}", where=where, todo=AGAIN)
    return dict(header)
