"""An optimizer's states on their way into a checkpoint and back, also those in 8 bits.

torchao's `OptimState8bit` holds codes and, for a block of 256 neighbours within a process, a scale. It is stored as
codes, scales and the table of the codes' values. Where rows are whole blocks, the blocks do not depend on the
number of processes, and any resumption is exact. Where they are not (vectors, odd widths), each element takes its
scale with it: exact with as many processes as before, rounded to 8 bits once more with another number. A tensor
that only some processes hold in 8 bits (a shard may be too small for it) is stored in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor


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
    rows_are_blocks = parameter.ndim > 1 and parameter.shape[-1] % local.block_size == 0
    scale = local.scale if rows_are_blocks else local.scale.repeat_interleave(local.block_size)
    scale = scale.view(*local.codes.shape[:-1], -1)
    return {
        f"{name}.codes": as_part(local.codes, parameter),
        f"{name}.scale": as_part(scale, parameter),
        f"{name}.qmap": local.qmap,
    }


def place(moment: Moment, stored: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Where to read a moment to; `stored` holds the shapes in the checkpoint."""
    local, parameter, name = moment.local, moment.parameter, moment.name
    if name in stored:
        value = as_part(torch.zeros(local.shape), parameter) if moment.quantized else moment.value
        return {name: value}
    scale_shape = (*local.shape[:-1], stored[f"{name}.scale"][-1] if local.ndim > 1 else local.shape[-1])
    return {
        f"{name}.codes": as_part(torch.zeros(local.shape, dtype=torch.uint8), parameter),
        f"{name}.scale": as_part(torch.zeros(scale_shape), parameter),
        f"{name}.qmap": torch.zeros(stored[f"{name}.qmap"]),
    }


def unpack(moment: Moment, placed: dict[str, torch.Tensor]) -> None:
    """Take over what was read, unless it was read into the moment itself."""
    local, name = moment.local, moment.name
    if name in placed:
        if moment.quantized:
            local.copy_(part_of(placed[name]).to(local.device))
        return
    codes, scale, qmap = (part_of(placed[f"{name}.{key}"]).to(local.device) for key in ("codes", "scale", "qmap"))
    blocks = scale.reshape(local.scale.numel(), -1) if moment.quantized else scale[:0]
    if moment.quantized and (blocks == blocks[:, :1]).all():
        local.codes.copy_(codes)
        local.scale.copy_(blocks[:, 0])
        return
    if scale.shape != codes.shape:
        scale = scale.repeat_interleave(codes.shape[-1] // scale.shape[-1], dim=-1)
    local.copy_(qmap[codes.int()] * scale)


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
