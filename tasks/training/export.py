"""The export: a plain model folder that `AutoModelForCausalLM`, lm-eval and vLLM load; written aside and
renamed.

Weights stay in float32, after CPT and after SFT, whatever the base came in: a bf16 copy between the stages
would round away most of what CPT learned (at a rate of 5e-6, 93 % of the weights would not move at all).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

MODEL, WRITING = "model", ".model.writing"


def export_model(
    directory: Path, model: Any, tokenizer: Any, tensors: dict[str, torch.Tensor], stop_ids: list[int]
) -> Path:
    """Write `model/` from gathered tensors; tied weights are stored once. Generation ends at any of `stop_ids` too."""
    aside, final = directory / WRITING, directory / MODEL
    clear_unfinished(directory)
    model.config.dtype = torch.float32
    model.config.use_cache = True  # the trainer turned it off
    known = model.generation_config.eos_token_id
    known = known if isinstance(known, list) else [known]
    ids = [token for token in dict.fromkeys([*known, *stop_ids]) if token is not None]
    model.generation_config.eos_token_id = ids if len(ids) > 1 else ids[0]
    model.save_pretrained(aside, state_dict=tensors)
    tokenizer.save_pretrained(aside)
    for file in aside.iterdir():
        file.chmod(0o644)  # safetensors writes files that only their owner may read
    if final.exists():  # of a run that was killed between this rename and its artifact
        shutil.rmtree(final)
    aside.rename(final)
    return final


def clear_unfinished(directory: Path) -> None:
    """Remove what a killed export left."""
    shutil.rmtree(directory / WRITING, ignore_errors=True)


def moved_share(before: Path, after: Path) -> float:
    """The share of weights that differ from where they started, tensor by tensor; rows that were added do not count."""
    moved = total = 0
    old_files = _tensor_files(before)
    for name, file in _tensor_files(after).items():
        if name not in old_files:
            continue
        new, old = _read(file, name), _read(old_files[name], name)
        new = new[: old.shape[0]] if new.shape[1:] == old.shape[1:] else new
        assert new.shape == old.shape, f"{name} changed its shape from {tuple(old.shape)} to {tuple(new.shape)}"
        moved += int((new.float() != old.float()).sum())
        total += old.numel()
    return moved / max(1, total)


def _tensor_files(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            found |= dict.fromkeys(tensors.keys(), file)
    return found


def _read(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, framework="pt") as tensors:
        tensor: torch.Tensor = tensors.get_tensor(name)
    return tensor
