"""A plan that does not fit: what it would take, and the nearest that fit.

First one key of the tag's row changed, then offloading, then other tags, then more of the same GPUs.
"""

from __future__ import annotations

from tasks.choose import Choice, Job, combinations, fastest_that_fits
from tasks.errors import UserError
from tasks.hardware import HARDWARE_FILE, Hardware, load_hardware, tags

MOST_GPUS, GPUS_OF_A_NODE = 128, 8
OPEN = {"microbatch_rows": "auto", "recompute": "auto", "precision": "auto"}
ALL_THREE = "microbatch_rows: {microbatch_rows}, recompute: {recompute}, precision: {precision}"


def refusal(tag: str, hardware: Hardware, job: Job, tried: list[Choice]) -> UserError:
    """The error of a plan that does not fit."""
    least = min(tried, key=lambda choice: choice.gib)
    those = "at the least, with" if len(tried) > 1 else "with"
    return UserError(
        f"{job.shape.parameters / 1e9:.1f}B parameters do not fit the tag '{tag}': {least.gib:.1f} GiB a GPU {those} "
        f"{least.say()}; a GPU has {hardware.memory_gib:g} GiB",
        where=f"{HARDWARE_FILE}, key {tag}",
        allowed="; ".join(nearest_that_fit(tag, hardware, job)) or "no setting and no tag that we know",
        todo="take one of these: change the row, or choose another tag with --hardware",
    )


def nearest_that_fit(tag: str, hardware: Hardware, job: Job) -> list[str]:
    """What fits, in words, the nearest first."""
    found = []
    for key in OPEN:
        if getattr(hardware, key) != "auto":
            found += _fitting(f"{key}: {{{key}}}", hardware.model_copy(update={key: "auto"}), job)
    free = hardware.model_copy(update=OPEN)
    if not found and free != hardware:
        found += _fitting(ALL_THREE, free, job)
    if hardware.offload == "none":
        found += _fitting(f"backend: fsdp, offload: cpu, {ALL_THREE}", free.model_copy(update=_OFFLOADED), job)
    return found + (_other_tags(tag, job)[:2] or _more_gpus(free, job))


_OFFLOADED = {"backend": "fsdp", "offload": "cpu"}


def _other_tags(tag: str, job: Job) -> list[str]:
    """Tags that fit, the one with the least memory first."""
    rows = [(name, load_hardware(name)) for name in tags() if name != tag]
    on_gpus = [(row.world_size * (row.memory_gib or 0), name, row) for name, row in rows if row.device == "cuda"]
    return [
        text
        for _, name, row in sorted(on_gpus, key=lambda r: r[:2])
        for text in _fitting(f"--hardware {name}", row, job)
    ]


def _more_gpus(hardware: Hardware, job: Job) -> list[str]:
    many = hardware.world_size
    while (many := many * 2) <= MOST_GPUS:
        nodes = max(1, many // GPUS_OF_A_NODE)
        row = hardware.model_copy(update={"backend": "fsdp", "processes": many // nodes, "nodes": nodes})
        if fitting := _fitting(f"{many} of these GPUs", row, job):
            return fitting
    return []


def _fitting(text: str, row: Hardware, job: Job) -> list[str]:
    best = fastest_that_fits(list(combinations(row, job)), row)
    if best is None:
        return []
    return [f"{text.format(**best.how)} ({best.gib:.1f} of {row.memory_gib:g} GiB with {best.say()})"]
