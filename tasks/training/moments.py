"""An optimizer's states on their way into a checkpoint and back, also those in 8 bits.

torchao's `OptimState8bit` holds codes and, for a block of 256 neighbours within a process, a scale. It is stored as
codes, scales and the table of the codes' values. Where rows are whole blocks, the scales are cut as the rows are.
Where they are not (vectors, odd widths), each process stores those of its own blocks (`NAME.scale.1of2`). It holds a
tensor in 8 bits only if its shard is whole blocks, so one behind the other they are the scales of the whole tensor's
blocks, however it is cut, and any resumption is exact. Only a shard that is too small, or no whole blocks, is held in
the weights' dtype: a tensor with such a shard somewhere is stored unpacked, and rounded once more with another number
of processes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tasks.errors import UserError

BLOCK = 256  # torchao's
PART = re.compile(r"\.scale\.(\d+)of(\d+)$")


@dataclass(frozen=True)
class Moment:
    """One state of one parameter."""

    name: str
    parameter: torch.Tensor
    value: torch.Tensor

    @property
    def local(self) -> Any:
        """What this process holds of it."""
        return self.value.to_local() if isinstance(self.value, DTensor) else self.value

    @property
    def quantized(self) -> bool:
        """Whether this process holds it in 8 bits."""
        return hasattr(self.local, "codes")


def agree(moments: list[Moment]) -> Iterator[tuple[Moment, bool]]:
    """Each moment, and whether every process holds it in 8 bits."""
    flags = [moment.quantized for moment in moments]
    everyone = [flags]
    if dist.is_initialized():
        everyone = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, flags)
    return zip(moments, [all(of_one) for of_one in zip(*everyone, strict=True)], strict=True)


def pack(moment: Moment, quantized: bool) -> dict[str, torch.Tensor]:
    """What is stored of a moment; `quantized` says whether it is in 8 bits everywhere."""
    local, parameter, name = moment.local, moment.parameter, moment.name
    if not quantized:
        value = as_part(local.dequantize(torch.float32), parameter) if moment.quantized else moment.value
        return {name: value}
    assert local.block_size == BLOCK, local.block_size
    codes = {f"{name}.codes": as_part(local.codes, parameter), f"{name}.qmap": local.qmap}
    if _rows_are_blocks(parameter):
        scale = local.scale.view(*local.codes.shape[:-1], -1)
        return codes | {f"{name}.scale": as_part(scale, parameter)}
    rank, processes = _rank_of(parameter)
    return codes | {f"{name}.scale.{rank}of{processes}": local.scale}


def place(moment: Moment, stored: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Where to read a moment to; `stored` holds the shapes in the checkpoint."""
    local, parameter, name = moment.local, moment.parameter, moment.name
    if name in stored:
        value = as_part(torch.zeros(local.shape), parameter) if moment.quantized else moment.value
        return {name: value}
    placed = {
        f"{name}.codes": as_part(torch.zeros(local.shape, dtype=torch.uint8), parameter),
        f"{name}.qmap": torch.zeros(stored[f"{name}.qmap"]),
    }
    if _rows_are_blocks(parameter):
        scale = torch.zeros((*local.shape[:-1], stored[f"{name}.scale"][-1]))
        return placed | {f"{name}.scale": as_part(scale, parameter)}
    return placed | {part: torch.zeros(stored[part]) for part in _parts(moment, stored)}


def unpack(moment: Moment, placed: dict[str, torch.Tensor]) -> None:
    """Take over what was read, unless it was read into the moment itself."""
    local, name, parameter = moment.local, moment.name, moment.parameter
    if name in placed:
        if moment.quantized:
            local.copy_(part_of(placed[name]).to(local.device))
        return
    codes, qmap = (part_of(placed[f"{name}.{key}"]).to(local.device) for key in ("codes", "qmap"))
    if _rows_are_blocks(parameter):
        scale, first = part_of(placed[f"{name}.scale"]).reshape(-1), 0
    else:
        parts = [part for part in placed if PART.search(part)]
        scale = torch.cat([placed[part] for part in parts])
        first = 0 if len(parts) == 1 and _is_mine(parts[0], parameter) else _first_element(parameter)
    scale = scale.to(local.device)
    if moment.quantized:
        assert first % BLOCK == 0, f"a shard of {name} begins within a block"
        local.codes.copy_(codes)
        local.scale.copy_(scale[first // BLOCK :][: local.scale.numel()])
        return
    places = (first + torch.arange(codes.numel(), device=local.device)) // BLOCK
    local.copy_(qmap[codes.int()] * scale[places].view(codes.shape))


def _rows_are_blocks(parameter: torch.Tensor) -> bool:
    return parameter.ndim > 1 and parameter.shape[-1] % BLOCK == 0


def _rank_of(parameter: torch.Tensor) -> tuple[int, int]:
    """Which part of how many this process holds."""
    if not isinstance(parameter, DTensor):
        return 0, 1
    return parameter.device_mesh.get_local_rank(), parameter.device_mesh.size()


def _parts(moment: Moment, stored: dict[str, tuple[int, ...]]) -> list[str]:
    """The stored scales to read: one's own where as many processes saved as load, else all, in their order."""
    found = {int(match[1]): (part, int(match[2])) for part in stored
             if part.startswith(f"{moment.name}.scale.") and (match := PART.search(part))}  # fmt: skip
    if not found:
        raise UserError("the checkpoint holds the optimizer's states as an earlier version saved them",
                        where=moment.name, todo="start the stage over with --force")  # fmt: skip
    rank, processes = _rank_of(moment.parameter)
    if found[0][1] == processes:
        return [found[rank][0]]
    return [found[number][0] for number in range(found[0][1])]


def _is_mine(part: str, parameter: torch.Tensor) -> bool:
    return part.endswith(".scale.{}of{}".format(*_rank_of(parameter)))


def _first_element(parameter: torch.Tensor) -> int:
    """Where this process's part begins in the whole tensor."""
    if not isinstance(parameter, DTensor):
        return 0
    rank, processes = _rank_of(parameter)
    each = -(-parameter.shape[0] // processes)
    return min(parameter.shape[0], rank * each) * (parameter.numel() // max(1, parameter.shape[0]))


def as_part(local: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A process's part of a tensor that is cut as the parameter is; only the last dimension may differ from its."""
    if not isinstance(parameter, DTensor):
        return local
    shape = torch.Size((*parameter.shape[:-1], local.shape[-1])) if parameter.ndim > 1 else parameter.shape
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
    )


def part_of(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
