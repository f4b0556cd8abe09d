"""A model under FSDP2, read by shards: each process reads the rows that it keeps, and no other.

The model is built without weights (parameters on the meta device, buffers for real), sharded as accelerate shards it,
and its shards are filled from slices of the safetensors files. The whole model never stands in a process's memory:
eight processes that each read 70B float32 parameters would take 2.2 TB of the host.

The weights are, bit for bit, those that `from_pretrained` loads. Where that cannot be told from the files' headers
(tensors that transformers renames or converts, code that the model brings, parameters that stay in float32) the model
is loaded whole, as before, and the log says why.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from tasks.errors import UserError
from tasks.host import usable_bytes
from tasks.memory import GIB
from tasks.model_shape import tensor_sizes
from tasks.training.attention import choose_attention
from tasks.training.model import PENDING, load_model, read_config
from tasks.training.precision import Precision
from tasks.training.states import plain_name
from tasks.trust import trusted

KEPT = {torch.float32: "F32", torch.bfloat16: "BF16"}
OLD_BUFFERS = "rotary_emb.inv_freq"  # in Llama 2's files, and no parameter; transformers leaves it out too


@dataclass
class Pending:
    """What is still to be read."""

    files: dict[str, Path]  # tensor -> its file
    new_ids: list[int]  # rows of the embeddings that get the mean of the rows of `old_ids`
    old_ids: list[int]


def load_for_shards(folder: Path, precision: Precision, seq_len: int, tell: Callable[[str], None]) -> PreTrainedModel:
    """The model without its weights, to be read by `shard`; whole, and told, where that is not possible."""
    why = _obstacle_of_config(folder)
    if not why:
        model, files = _build_empty(folder, precision, seq_len), weight_files(folder)
        why = _obstacle_of_names(model, precision, files)
        if not why:
            setattr(model, PENDING, Pending(files, [], []))
            return model
    tell(f"warning: every process reads the whole model into memory ({why})")
    _check_memory(folder, precision, int(os.environ.get("LOCAL_WORLD_SIZE", "1")), why)
    return load_model(folder, precision, seq_len)


def _check_memory(folder: Path, precision: Precision, processes: int, why: str) -> None:
    """Refuse where this node's processes cannot hold a copy each; what needs no cast stays in the files' pages."""
    sizes, kept = tensor_sizes(folder), KEPT[precision.weights]
    cast = {name for file in folder.glob("*.safetensors") for name, dtype in _dtypes(file) if dtype != kept}
    needed = processes * sum(sizes[name] for name in cast) * precision.weights.itemsize
    if needed > (there := usable_bytes()):
        raise UserError(
            f"every one of {processes} processes reads the whole model ({why}): {needed / GIB:,.0f} GiB of this "
            f"machine's own memory, of which we may use {there / GIB:,.0f}",
            where=str(folder),
            allowed="files that name the model's own tensors, one to one: those are read by shards",
            todo=f"load it once on a machine that holds it, in {precision.weights}, and `save_pretrained`",
        )


def _dtypes(file: Path) -> list[tuple[str, str]]:
    with safe_open(file, framework="pt") as tensors:
        return [(name, tensors.get_slice(name).get_dtype()) for name in tensors.keys()]  # noqa: SIM118


def is_pending(model: Any) -> bool:
    """Whether the model's weights are still in its files."""
    return hasattr(model, PENDING)


@torch.no_grad()
def shard(model: Any, accelerator: Any) -> bool:
    """Shard a model without weights and read this process's rows; False, and nothing done, for one that has them."""
    if not is_pending(model):
        return False
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model  # one that is sharded it takes as it is, later

    pending: Pending = getattr(model, PENDING)
    delattr(model, PENDING)
    fsdp2_prepare_model(accelerator, model)
    offloads = isinstance(accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy)
    device = torch.device("cpu") if offloads else accelerator.device
    model._apply(lambda t: torch.empty_like(t, device=device) if isinstance(t, DTensor) else t)
    means = _mean_rows(model, pending)
    for name, tensor, source in _places(model, pending.files):
        if isinstance(tensor, DTensor):
            _read_rows(tensor, source, pending.new_ids, means.get(name))
        else:
            tensor.copy_(source[...])
    return True


# --- whether it is possible -------------------------------------------------------------------------------------------


def weight_files(folder: Path) -> dict[str, Path]:
    """Tensor -> file, of the files that transformers would read; empty where they are not whole."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        with safe_open(single, framework="pt") as tensors:
            return dict.fromkeys(tensors.keys(), single)
    if not index.is_file():
        return {}
    said = json.loads(index.read_text())["weight_map"]
    return {name: folder / file for name, file in said.items() if (folder / file).is_file()}


def _obstacle_of_config(folder: Path) -> str:
    if trusted():
        return "it brings its own code"
    return "it is quantized" if getattr(read_config(folder), "quantization_config", None) else ""


def _obstacle_of_names(model: Any, precision: Precision, files: dict[str, Path]) -> str:
    """Why the files' tensors are not the model's one to one."""
    stored = set(model.state_dict())
    mine = {name for name, _ in [*model.named_parameters(), *model.named_buffers()] if name in stored}
    if any(isinstance(conversion, WeightConverter) for conversion in get_model_conversion_mapping(model)):
        return "transformers converts its tensors"
    in_float32 = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    if precision.weights is not torch.float32 and any(getattr(model, name, None) for name in in_float32):
        return "some of its parameters stay in float32"
    if different := mine ^ {name for name in files if not name.endswith(OLD_BUFFERS)}:
        return f"its files name other tensors: {min(different)}"
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    try:
        wrong = [name for name, source in _slices(files) if name in mine and tuple(source.get_shape()) != shapes[name]]
    except SafetensorError as error:
        return str(error)
    return f"{wrong[0]} has another shape in the files" if wrong else ""


def _build_empty(folder: Path, precision: Precision, seq_len: int) -> PreTrainedModel:
    """As `from_pretrained` builds it, with buffers and without weights."""
    config = read_config(folder)
    implementation = choose_attention(config, seq_len)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, dtype=precision.weights, attn_implementation=implementation, trust_remote_code=False
        )
    model.tie_weights()  # making them empty cut the ties
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    empty: PreTrainedModel = model.eval()
    return empty


# --- reading ----------------------------------------------------------------------------------------------------------


def _slices(files: dict[str, Path]) -> Iterator[tuple[str, Any]]:
    """Each tensor's name and handle, file by file; a file is closed, and its pages are free, behind its last one."""
    for file in sorted(set(files.values())):
        with safe_open(file, framework="pt") as tensors:
            for name in (name for name, where in files.items() if where == file):
                yield name, tensors.get_slice(name)


def _places(model: Any, files: dict[str, Path]) -> Iterator[tuple[str, torch.Tensor, Any]]:
    """Name, where to, and where from, of all that is stored of a model."""
    tensors = {plain_name(name): tensor for name, tensor in [*model.named_buffers(), *model.named_parameters()]}
    for name, source in _slices(files):
        if name in tensors:
            yield name, tensors[name], source


def _read_rows(tensor: DTensor, source: Any, new_ids: list[int], mean: torch.Tensor | None) -> None:
    """This process's rows of a tensor; rows that the file does not have are zero, but for new tokens'."""
    first, local = first_row(tensor), tensor.to_local()
    in_file = max(0, min(first + len(local), source.get_shape()[0]) - first)
    if in_file:
        local[:in_file].copy_(source[first : first + in_file])
    local[in_file:].zero_()
    if mean is not None and (mine := [row - first for row in new_ids if first <= row < first + len(local)]):
        local[mine] = mean.to(local.device)


def first_row(tensor: DTensor) -> int:
    """The first row of this process's part; FSDP2 gives every process as many, and the last ones less or none."""
    assert tensor.placements == (Shard(0),), f"cut in another way: {tensor.placements}"
    rows, processes = tensor.shape[0], tensor.device_mesh.size()
    each = -(-rows // processes)
    first = min(rows, tensor.device_mesh.get_local_rank() * each)
    assert tensor.to_local().shape[0] == min(each, rows - first), "cut at other rows"
    return first


def _mean_rows(model: Any, pending: Pending) -> dict[str, torch.Tensor]:
    """Embedding -> what its new tokens get. One process reads all of an embedding for it, and tells the others."""
    if not pending.new_ids:
        return {}
    weights = {id(e.weight): e.weight for e in (model.get_input_embeddings(), model.get_output_embeddings()) if e}
    names = [plain_name(name) for name, parameter in model.named_parameters() if id(parameter) in weights]
    dtype, found = next(model.parameters()).dtype, [None] * len(names)
    if dist.get_rank() == 0:
        found = [_mean(pending, name, dtype) for name in names]
    dist.broadcast_object_list(found, src=0)
    return dict(zip(names, found, strict=True))  # type: ignore[arg-type]


def _mean(pending: Pending, name: str, dtype: torch.dtype) -> Any:
    with safe_open(pending.files[name], framework="pt") as tensors:
        return tensors.get_tensor(name).to(dtype)[pending.old_ids].mean(dim=0)
