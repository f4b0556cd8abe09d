"""A copy of a trained model in half the bytes, for serving: `python -m tasks.training.deploy MODEL OUT [float16]`.

Stages hand each other float32 (see export.py: a bf16 copy between them would round away what CPT learned). A server
computes in bf16 anyway, so what is deployed may be rounded once, at the very end: bfloat16 unless said otherwise.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from tasks.errors import EXIT_USER_ERROR, UserError
from tasks.stage import write_json
from tasks.training.export import FILE_BYTES, read_tensor, tensor_files, write_weights

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def copy_model(model: Path, out: Path, dtype: str = "bfloat16", file_bytes: int = FILE_BYTES) -> None:
    """Copy a model folder with its floating-point weights in `dtype`; one tensor after the other, renamed last."""
    if not (model / "config.json").is_file() or not tensor_files(model):
        raise UserError(f"{model} is no model folder", allowed="one with config.json and *.safetensors")
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype '{dtype}'", allowed=", ".join(DTYPES))
    if out.exists():
        raise UserError(f"{out} exists", todo="name a folder that does not")
    aside = out.with_name(f".{out.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)  # of a copy that was killed
    aside.mkdir(parents=True)
    for file in model.iterdir():
        if file.is_file() and ".safetensors" not in file.suffixes:
            shutil.copyfile(file, aside / file.name)
    write_json(aside / "config.json", json.loads((model / "config.json").read_text()) | {"dtype": dtype})
    write_weights(aside, _rounded(model, DTYPES[dtype]), file_bytes)
    for file in aside.iterdir():
        file.chmod(0o644)  # the server may be another user
    aside.rename(out)


def _rounded(model: Path, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    for name, file in tensor_files(model).items():
        tensor = read_tensor(file, name)
        yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: python -m tasks.training.deploy MODEL OUT [bfloat16|float16]")
    try:
        copy_model(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else "bfloat16")
    except UserError as error:
        print(error.render())
        sys.exit(EXIT_USER_ERROR)
