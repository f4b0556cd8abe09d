"""What is here: GPUs, extras, and whether they are what a hardware tag says. Asks nvidia-smi; torch is not loaded.

`auto` is a tag that this machine resolves: a row of `configs/hardware.yaml` that describes it, or one made for it.
Everything that is missing is told before a stage starts.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
from dataclasses import dataclass
from typing import Any

from tasks.cards import card_of
from tasks.errors import UserError
from tasks.gpus import listed
from tasks.hardware import AUTO, HARDWARE_FILE, Hardware, load_hardware, tags
from tasks.host import usable_bytes

QUERY = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits"]
TIMEOUT_SECONDS = 30
UNUSABLE_GIB = 0.7  # of what nvidia-smi says; torch sees a little less (H200: 140.4 and 139.8)
# What a training needs beside the base install -> the extra that brings it.
EXTRAS = {"unsloth": "unsloth", "torchao": "gpu"}


@dataclass(frozen=True)
class Gpu:
    """A GPU that processes started here can use."""

    name: str
    memory_gib: float  # 0: not known


def gpus() -> list[Gpu]:
    """The GPUs of this machine, less those that CUDA_VISIBLE_DEVICES hides; empty without a driver.

    Of a card that is cut into slices (MIG) CUDA takes one, whose memory nvidia-smi does not tell here.
    """
    try:
        said = subprocess.run(QUERY, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[field.strip() for field in line.split(",")] for line in said.splitlines() if line.count(",") >= 3]
    slices = {uuid: cut for uuid, *cut in listed()}
    found = [(name, memory, uuid) for index, uuid, name, memory, *_ in rows if _is_visible(index, uuid, slices)]
    return [
        Gpu(f"slice of {name}", 0.0) if slices.get(uuid) else Gpu(name, _gib(memory)) for name, memory, uuid in found
    ]


def resolve_tag(tag: str, where: str = "") -> tuple[str, Hardware]:
    """The tag and its row; `auto` becomes the tag of this machine. `where` is who names it."""
    return _detect(gpus()) if tag == AUTO else (tag, load_hardware(tag, where=where))


def missing_here(tag: str, hardware: Hardware, hows: list[dict[str, Any]], host_gib: float = 0.0) -> UserError | None:
    """What this machine lacks for the tag and its stages' orders; `host_gib` is what they take of its own memory."""
    if hardware.device == "cpu":
        return None
    missing = _missing_gpus(tag, hardware, gpus()) or _missing_extras(tag, hardware, hows)
    return missing or _missing_memory(tag, hardware, host_gib)


def _missing_gpus(tag: str, hardware: Hardware, found: list[Gpu]) -> UserError | None:
    where = f"hardware tag {tag}"
    if not found:
        return UserError(
            f"the tag '{tag}' needs {_count(hardware.processes)}, and nvidia-smi shows none that we may use here",
            where=where,
            todo="run it where the GPUs are, check the driver and CUDA_VISIBLE_DEVICES, or take --hardware cpu",
        )
    if len(found) < hardware.processes:
        return UserError(
            f"the tag '{tag}' needs {_count(hardware.processes)}, this machine has {len(found)}",
            where=where,
            allowed=", ".join(f"{gpu.name} ({gpu.memory_gib:.1f} GiB)" for gpu in found),
            todo="take a tag with as many GPUs, or --hardware auto",
        )
    least = min(found, key=lambda gpu: gpu.memory_gib)
    if hardware.memory_gib and 0 < least.memory_gib < hardware.memory_gib:
        return UserError(
            f"the tag '{tag}' says {hardware.memory_gib:g} GiB a GPU, the {least.name} here has {least.memory_gib:.1f}",
            where=where,
            todo="take the tag of this machine, or --hardware auto: the plan is made for the memory that is there",
        )
    return None


def _missing_extras(tag: str, hardware: Hardware, hows: list[dict[str, Any]]) -> UserError | None:
    needed = {"unsloth": hardware.backend == "unsloth",
              "torchao": any(how.get("precision") == "bf16-stochastic" for how in hows)}  # fmt: skip
    for package, why in needed.items():
        if why and importlib.util.find_spec(package) is None:
            for_what = f"the tag '{tag}'" if package == "unsloth" else "precision bf16-stochastic"
            instead = ", or a tag with backend fsdp" if package == "unsloth" else ""
            return UserError(f"{for_what} needs {package}, which is not installed", where=f"hardware tag {tag}",
                             todo=f"pip install -e '.[{EXTRAS[package]}]'{instead}")  # fmt: skip
    return None


def _missing_memory(tag: str, hardware: Hardware, needed_gib: float) -> UserError | None:
    """Whether loading, and what is offloaded, fit this node's own memory, or our share of it."""
    has_gib = usable_bytes() / 2**30
    if needed_gib <= has_gib:
        return None
    offloads = hardware.offload == "cpu"
    processes = f"{hardware.processes} process{'es' if hardware.processes > 1 else ''}"
    return UserError(
        f"{'offload: cpu' if offloads else 'the training'} takes {needed_gib:,.0f} GiB of this machine's own memory "
        f"({processes}), of which we may use {has_gib:,.0f}",
        where=f"hardware tag {tag}",
        todo="spread it over more nodes, or take GPUs that hold it without offload" if offloads else
             "run it where the machine, the container or the batch job has as much",
    )  # fmt: skip


# --- auto -------------------------------------------------------------------------------------------------------------


def _detect(found: list[Gpu]) -> tuple[str, Hardware]:
    if not found:
        return "cpu", load_hardware("cpu")
    backend = "unsloth" if len(found) == 1 and importlib.util.find_spec("unsloth") else "fsdp"
    for tag in tags():
        row = load_hardware(tag)
        if row.device == "cuda" and row.nodes == 1 and row.backend == backend and _describes(row, found):
            return tag, row
    return _row_for(found, backend)


def _describes(row: Hardware, found: list[Gpu]) -> bool:
    """Whether a row is these GPUs: their number, their kind and, within a tenth, their memory."""
    least = min(gpu.memory_gib for gpu in found)
    return (
        row.processes == len(found)
        and all(card_of(gpu.name) == row.card for gpu in found)
        and 0.9 * least <= (row.memory_gib or 0) <= least
    )


def _row_for(found: list[Gpu], backend: str) -> tuple[str, Hardware]:
    """A row of its own for a machine that no tag describes."""
    least = min(found, key=lambda gpu: gpu.memory_gib)
    cards = {card_of(gpu.name) for gpu in found}
    card = cards.pop() if len(cards) == 1 else None
    pool = "gpu-single" if len(found) == 1 else "gpu-multi"
    if least.memory_gib <= UNUSABLE_GIB:
        raise UserError(f"nvidia-smi does not say the memory of the {least.name}", where=f"hardware tag {AUTO}",
                        todo=f"write a row with its memory_gib into {HARDWARE_FILE}")  # fmt: skip
    tag = f"{len(found)}x{card or 'gpu'}-{round(least.memory_gib)}gb"
    tag += f"-{backend}" if tag in tags() else ""  # that row is for the other backend
    memory_gib = round(least.memory_gib - UNUSABLE_GIB, 1)
    row = Hardware(
        backend=backend, device="cuda", processes=len(found), card=card, memory_gib=memory_gib, work_pool=pool
    )  # type: ignore[arg-type]
    return tag, row


def _gib(mebibytes: str) -> float:
    """nvidia-smi's memory; some integrated GPUs say [N/A]."""
    try:
        return float(mebibytes) / 1024
    except ValueError:
        return 0.0


def _is_visible(index: str, uuid: str, slices: dict[str, list[str]]) -> bool:
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is None:
        return True
    names = [name.strip() for name in shown.split(",") if name.strip()]
    own = [uuid, *slices.get(uuid, [])]
    by_uuid = any(one.startswith(name) for one in own for name in names if name.startswith(("GPU-", "MIG-")))
    return index in names or by_uuid or any(name.startswith(f"MIG-{uuid}/") for name in names)  # an older driver's


def _count(number: int) -> str:
    return f"{number} GPU{'s' if number != 1 else ''}"
