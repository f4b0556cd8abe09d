"""Which memory was full: a GPU's or the machine's own. Libraries tell it in words of their own, and the driver says the
same of both: `CUDA error: out of memory` is also what pinning the host's memory ends with."""

from __future__ import annotations

import resource
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from tasks.stage import OOM, read_order, write_json

GPU, HOST = "gpu", "host"
DRIVER = ("CUDA error: out of memory", "[CUDA]: out of memory")
SAID_OF_A_GPU = (*DRIVER, "Cuda failure 2 'out of memory'", "CUBLAS_STATUS_ALLOC_FAILED")
SAID_OF_THE_HOST = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")
ROOM_BYTES = 2**30  # a GPU with as much left was not what was full: shards and their gradients are smaller


def which_is_full(error: BaseException | None) -> str:
    """`gpu`, `host`, or empty for an error of another kind."""
    while error is not None:
        text = str(error)
        if isinstance(error, MemoryError) or any(said in text for said in SAID_OF_THE_HOST):
            return HOST
        if type(error).__name__ == "OutOfMemoryError":  # of torch's own allocator, which has GPU memory only
            return GPU
        if any(said in text for said in SAID_OF_A_GPU):
            return HOST if any(said in text for said in DRIVER) and (_was_pinning(error) or _has_room()) else GPU
        error = error.__cause__ or error.__context__
    return ""


def record_full(directory: Path, which: str) -> None:
    """What the launcher needs to word the error, and to go on with less (tasks/oom.py); any process may be the one."""
    import torch

    from tasks.training.metrics import read_metrics

    traceback.print_exc()
    how, lines = read_order(directory).how, read_metrics(directory)
    measured = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    predicted = how.get("predicted_gib")
    if which == HOST:
        measured = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        predicted = how.get("predicted_host_gib")
    record: dict[str, Any] = {"measured_gib": measured, "predicted_gib": predicted, "step": len(lines) + 1,
                              "microbatch_rows": how.get("microbatch_rows", 1), "memory": which}  # fmt: skip
    write_json(directory / OOM, record)


def _was_pinning(error: BaseException) -> bool:
    """Whether the innermost call was for pinned memory."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and "pin_memory" in (frames[-1].line or "") + frames[-1].name


def _has_room() -> bool:
    """Whether this process's GPU has memory left."""
    import torch

    if not torch.cuda.is_available():
        return False
    with suppress(RuntimeError):
        return torch.cuda.mem_get_info()[0] > ROOM_BYTES
    return False
