"""The memory of a node itself: what training takes of it, and how much of it we may use. Loads no torch.

Under FSDP2 each process reads the rows that it keeps straight to where they stay (tasks/training/loading.py). On the
host live the processes, one tensor at a time while loading, and what is offloaded. What is pinned there, torch takes
in powers of two: weights and gradients under `offload: cpu`, tensor by tensor (moments are not pinned).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

from tasks.memory import STATE_BYTES, Setting, stream_bytes
from tasks.model_shape import ModelShape

# Python, torch, CUDA's context, code: 1.1 to 1.7 GiB a process measured. A node may take 5 more: 4 of 31 runs did,
# and nothing that we know of explains it.
PROCESS_BYTES, SPARE_BYTES = 2.0 * 2**30, 5.0 * 2**30
CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def host_bytes(shape: ModelShape, setting: Setting, processes: int) -> float:
    """The most that a node's `processes` hold of its memory at a time, while loading or later."""
    own = processes * PROCESS_BYTES + SPARE_BYTES
    return own + max(_loading(shape, setting, processes), _training(shape, setting, processes))


def _loading(shape: ModelShape, setting: Setting, processes: int) -> float:
    """The embedding is the largest tensor. New tokens' rows take all of it once, and a copy; else a shard's rows do."""
    width = STATE_BYTES[setting.precision][0]
    means = 2 * width * shape.embedding
    if setting.offload == "cpu":
        return means + processes * pinned_bytes(shape, setting.world_size, width)
    if setting.world_size > 1:
        return means + processes * 4.0 * shape.embedding / setting.world_size
    return means if setting.backend == "unsloth" else means + width * shape.parameters


def _training(shape: ModelShape, setting: Setting, processes: int) -> float:
    """What is offloaded: the states, or Unsloth's inputs of layers."""
    if setting.recompute == "unsloth":
        inputs = setting.tokens * shape.hidden * stream_bytes(setting)
        return processes * shape.num_layers * power_of_two(inputs)
    if setting.offload != "cpu":
        return 0.0
    weights, gradients, moments = STATE_BYTES[setting.precision]
    pinned = sum(pinned_bytes(shape, setting.world_size, width) for width in (weights, gradients))
    return processes * (pinned + moments * shape.parameters / setting.world_size)


def pinned_bytes(shape: ModelShape, world_size: int, width: float) -> float:
    """One process's shards of all tensors, each of `width` bytes an element and rounded up to a power of two."""
    matrices = [(shape.queries, shape.hidden), (shape.keys, shape.hidden), (shape.keys, shape.hidden),
                (shape.hidden, shape.queries), (shape.mlp, shape.hidden), (shape.mlp, shape.hidden),
                (shape.hidden, shape.mlp)]  # fmt: skip
    layer = sum(_shard(rows, columns, world_size, width) for rows, columns in matrices)
    ends = (1 if shape.tied else 2) * _shard(shape.vocabulary, shape.hidden, world_size, width)
    counted = shape.num_layers * sum(rows * columns for rows, columns in matrices)
    others = shape.parameters - counted - (1 if shape.tied else 2) * shape.embedding  # norms and biases: small
    return shape.num_layers * layer + ends + 2 * width * max(0, others) / world_size


def _shard(rows: int, columns: int, world_size: int, width: float) -> int:
    return power_of_two(math.ceil(rows / world_size) * columns * width)


def power_of_two(size: float) -> int:
    """What torch's cache of pinned memory takes for `size` bytes."""
    return 1 << max(0, math.ceil(size) - 1).bit_length()


# --- what there is ----------------------------------------------------------------------------------------------------


def usable_bytes() -> int:
    """This machine's memory, or what a container or a batch system's job may take of it."""
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([there, *_limits()])


def _limits() -> Iterator[int]:
    """What our control groups, and those that they lie in, allow: of both kinds that Linux knows."""
    said = OWN_CGROUPS.read_text().splitlines() if OWN_CGROUPS.is_file() else []
    for _, kinds, place in (line.split(":", 2) for line in said if line.count(":") >= 2):
        if kinds and "memory" not in kinds.split(","):
            continue
        root, name = (CGROUPS / "memory", "memory.limit_in_bytes") if kinds else (CGROUPS, "memory.max")
        group = root / place.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root):
                break
            text = (folder / name).read_text().strip() if (folder / name).is_file() else ""
            if text.isdigit():
                yield int(text)
