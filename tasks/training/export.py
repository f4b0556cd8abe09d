"""The export: a plain model folder that `AutoModelForCausalLM`, lm-eval and vLLM load; written aside and
renamed. Tensors come one at a time (from all processes, where the model is sharded) and leave file by file, so no GPU
and no process holds the whole model for it.

Weights keep the dtype that they were trained in, after CPT and after SFT, whatever the base came in: a bf16 copy of
float32 weights between the stages would round away most of what CPT learned (at a rate of 5e-6, 93 % of the weights
would not move at all).
"""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.core_model_loading import revert_weight_conversion

from tasks.stage import write_json
from tasks.training.states import plain_name

MODEL, WRITING = "model", ".model.writing"
FILE_BYTES = 4_000_000_000
SAMPLING = {"temperature", "top_p", "top_k", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"}
INVALID = re.compile(r"^- `(\w+)`:", re.MULTILINE)  # what transformers says of a generation config, a line a value
LAYER = re.compile(r"(.*?\.\d+\.|)")  # what stands before a layer's own names; nothing outside the layers


def mend_generation(model: Any) -> str:
    """Make valid the generation config that a base came with; what was changed, empty for nothing.

    transformers loads an invalid one with a warning, and refuses to save it: behind all training. Values that have no
    effect are dropped, but sampling values of a file that does not say whether to sample: it meant to.
    """
    generation, changed = model.generation_config, []
    if generation.do_sample is None and SAMPLING.intersection(_invalid_values(generation)):
        generation.do_sample = True
        changed.append("do_sample is true")
    for name in _invalid_values(generation):
        changed.append(f"{name} is gone, it was {getattr(generation, name)}")
        setattr(generation, name, None)
    return "; ".join(changed)


def _invalid_values(generation: Any) -> list[str]:
    try:
        generation.validate(strict=True)
    except ValueError as error:
        return INVALID.findall(str(error))
    return []


def export_model(
    directory: Path,
    model: Any,
    tokenizer: Any,
    tensors: Iterable[tuple[str, torch.Tensor]],
    stop_ids: list[int],
    file_bytes: int = FILE_BYTES,
) -> Path:
    """Write `model/` from a stream of whole tensors, tied ones once. Generation ends at any of `stop_ids` too."""
    aside, final = directory / WRITING, directory / MODEL
    clear_unfinished(directory)
    model.config.dtype = next(model.parameters()).dtype  # not what the base came in
    model.config.use_cache = True  # the trainer turned it off
    known = model.generation_config.eos_token_id
    known = known if isinstance(known, list) else [known]
    ids = [token for token in dict.fromkeys([*known, *stop_ids]) if token is not None]
    model.generation_config.eos_token_id = ids if len(ids) > 1 else ids[0]
    model.save_pretrained(aside, state_dict={})  # everything but the weights
    tokenizer.save_pretrained(aside)
    write_weights(aside, in_original_form(model, tensors), file_bytes)
    for file in aside.iterdir():
        file.chmod(0o644)  # safetensors writes files that only their owner may read
    if final.exists():  # of a run that was killed between this rename and its artifact
        shutil.rmtree(final)
    aside.rename(final)
    return final


def in_original_form(model: Any, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors as the architecture's checkpoints hold them: transformers loads experts, for one, fused.

    A layer at a time, because several tensors may have been made of one, or one of several.
    """
    for _, layer in itertools.groupby(tensors, key=lambda entry: LAYER.match(entry[0] + ".")[0]):  # type: ignore[index]
        yield from revert_weight_conversion(model, {plain_name(name): tensor for name, tensor in layer}).items()


def write_weights(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], file_bytes: int) -> None:
    """Write safetensors of at most `file_bytes` (or one tensor), with an index where there are several.

    No more than one file's tensors are in memory.
    """
    files: list[dict[str, int]] = []  # the names in each file, and their bytes
    waiting: dict[str, torch.Tensor] = {}

    def write() -> None:
        save_file(waiting, folder / f"part-{len(files)}.safetensors", {"format": "pt"})
        files.append({name: tensor.nbytes for name, tensor in waiting.items()})
        waiting.clear()

    for name, tensor in tensors:
        if waiting and sum(t.nbytes for t in waiting.values()) + tensor.nbytes > file_bytes:
            write()
        tensor = tensor.contiguous()
        part_of_more = tensor.untyped_storage().nbytes() != tensor.nbytes  # safetensors refuses shared storage
        waiting[name] = tensor.clone() if part_of_more else tensor
        del tensor
    write()
    name_files(folder, files)


def name_files(folder: Path, files: list[dict[str, int]]) -> None:
    """Give the written parts the names that every loader looks for."""
    names = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    if len(files) == 1:
        names = ["model.safetensors"]
    else:
        total = sum(size for sizes in files for size in sizes.values())
        where = {tensor: name for name, sizes in zip(names, files, strict=True) for tensor in sizes}
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    for number, name in enumerate(names):
        (folder / f"part-{number}.safetensors").rename(folder / name)


def clear_unfinished(directory: Path) -> None:
    """Remove what a killed export left."""
    shutil.rmtree(directory / WRITING, ignore_errors=True)


def moved_share(before: Path, after: Path, prefix: str = "") -> float | None:
    """The share of weights that differ from where they started, tensor by tensor; rows that were added do not count.

    They started as `before` in the dtype that they were trained in: rounding on loading is no move. Names count without
    the model's `prefix`, which the files of some bases lack (GPT-2's). None where not one name is the same.
    """
    moved = total = 0
    old_files = {name.removeprefix(f"{prefix}."): (name, file) for name, file in tensor_files(before).items()}
    for name, file in tensor_files(after).items():
        if name.removeprefix(f"{prefix}.") not in old_files:
            continue
        old_name, old_file = old_files[name.removeprefix(f"{prefix}.")]
        new, old = read_tensor(file, name), read_tensor(old_file, old_name)
        new = new[: old.shape[0]] if new.shape[1:] == old.shape[1:] else new
        assert new.shape == old.shape, f"{name} changed its shape from {tuple(old.shape)} to {tuple(new.shape)}"
        moved += int((new != old.to(new.dtype)).sum())
        total += old.numel()
    return moved / total if total else None


def tensor_files(folder: Path) -> dict[str, Path]:
    """Which file of a folder holds which tensor."""
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            found |= dict.fromkeys(tensors.keys(), file)
    return found


def read_tensor(file: Path, name: str) -> torch.Tensor:
    """One tensor of a file."""
    with safe_open(file, framework="pt") as tensors:
        tensor: torch.Tensor = tensors.get_tensor(name)
    return tensor
