"""Disk that a training stage takes: its checkpoints, one more in the making, and the exported model."""

from __future__ import annotations

from pathlib import Path

from tasks.disk import free_bytes
from tasks.errors import UserError
from tasks.memory import STATE_BYTES
from tasks.training.checkpoint import DAMAGED, FOLDER


def checkpoint_bytes(num_parameters: int, precision: str) -> float:
    """One checkpoint: weights and the optimizer's states."""
    weights, _, optimizer = STATE_BYTES[precision]
    return num_parameters * (weights + optimizer)


def stage_bytes(num_parameters: int, precision: str, keep_last: int) -> float:
    """What a stage needs at most; the export keeps the weights' dtype."""
    export = num_parameters * STATE_BYTES[precision][0]
    return checkpoint_bytes(num_parameters, precision) * (keep_last + 1) + export


def check_disk(directory: Path, num_parameters: int, precision: str, keep_last: int) -> None:
    """Refuse a stage whose checkpoints and export would not fit.

    Checkpoints that stand are counted as room; not what is damaged among them, which stays until the stage is done.
    """
    needed = stage_bytes(num_parameters, precision, keep_last)
    checkpoints = directory / FOLDER
    sound = [file for file in checkpoints.rglob("*") if not file.relative_to(checkpoints).parts[0].startswith(DAMAGED)]
    present = sum(file.stat().st_size for file in sound if file.is_file())
    free = free_bytes(directory)
    if free + present < needed:
        raise UserError(
            f"the disk is too small for the checkpoints: {needed / 1e9:,.1f} GB needed, {free / 1e9:,.1f} GB free",
            where=str(directory),
            allowed=f"{keep_last + 1} checkpoints (one in the making) and the export of {num_parameters:,} parameters",
            todo="free space, lower checkpoint.keep_last or set runs_dir to another disk",
        )
