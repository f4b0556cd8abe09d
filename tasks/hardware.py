"""Where a run happens: the schema of a hardware tag, one row of `configs/hardware.yaml`.

A row is recorded with every stage and never part of its identity. What it leaves to `auto` the plan chooses
(`tasks/choose.py`), so that an order holds concrete values only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from tasks.errors import UserError
from tasks.yaml_file import Misplaced, Section, nearest, read_yaml, validate

HARDWARE_FILE = Path("configs/hardware.yaml")
AUTO = "auto"  # a tag, and a value: the machine decides, or the plan

Precision = Literal["fp32", "fp32-master", "bf16-stochastic", "bf16"]
Recompute = Literal["none", "pointwise", "selective", "full", "unsloth"]
Auto = Literal["auto"]


class Hardware(Section):
    """One row: the machine, and how training uses it."""

    backend: Literal["unsloth", "fsdp"] = Field(description="unsloth: one GPU; fsdp: one process or many, also on CPU")
    device: Literal["cpu", "cuda"]
    processes: int = Field(1, ge=1, description="GPUs, or CPU processes, of one node")
    nodes: int = Field(1, ge=1)
    card: str | None = Field(None, description="name of the GPU in tasks/cards.py, for the plan of time")
    memory_gib: float | None = Field(None, gt=0, description="of one GPU, as torch sees it")
    precision: Precision | Auto = "auto"
    recompute: Recompute | Auto = Field("auto", description="what a layer computes again in the backward pass")
    microbatch_rows: int | Auto = Field("auto", description="packed rows a forward pass and process")
    offload: Literal["none", "cpu"] = Field("none", description="cpu: weights and optimizer live in the host's memory")
    compile: bool | None = Field(None, description="compiled decoder layers; default: on a GPU")
    on_oom: Literal["fail", "retry"] = Field("fail", description="retry: go on at half the micro-batch")
    threads: int | None = Field(None, ge=1, description="CPU threads a process; default: its share of the cores")
    rendezvous: str | None = Field(None, description="host:port where several nodes meet; default: the environment's")
    work_pool: str = "cpu"

    @property
    def world_size(self) -> int:
        """Processes of all nodes."""
        return self.processes * self.nodes

    @property
    def compiles(self) -> bool:
        """Compiled layers: as said, else on GPUs, but not for float32.

        Float32's attention has another shape with every micro-batch, and each would be compiled.
        """
        return self.device == "cuda" and self.precision != "fp32" if self.compile is None else self.compile

    @model_validator(mode="after")
    def _check(self) -> Hardware:
        if isinstance(self.microbatch_rows, int) and self.microbatch_rows < 1:
            raise Misplaced(f"microbatch_rows is {self.microbatch_rows}; 1 or more, or auto", "microbatch_rows")
        if self.device == "cuda" and not self.memory_gib:
            raise Misplaced("a GPU's row says its 'memory_gib', for the plan", "device")
        self._check_backend()
        self._check_offload()
        if self.rendezvous and self.nodes == 1:
            raise Misplaced("'rendezvous' is where several nodes meet; this row has one", "rendezvous")
        return self

    def _check_backend(self) -> None:
        if self.backend == "unsloth" and self.device == "cpu":
            raise Misplaced("backend unsloth needs a GPU (device: cuda); on CPUs use fsdp", "backend")
        if self.backend == "unsloth" and self.world_size > 1:
            raise Misplaced(
                f"backend unsloth trains on one GPU, this row has {self.world_size}; use backend: fsdp", "backend"
            )
        if self.recompute == "unsloth" and self.backend != "unsloth":
            others = "none, pointwise, selective, full" if self.compiles else "none, selective, full"
            raise Misplaced(f"recompute unsloth is Unsloth's own; with backend fsdp: {others}", "recompute")

        if self.recompute == "pointwise" and not self.compiles:
            raise Misplaced("recompute pointwise is the compiler's, and these layers are not compiled (in fp32 and "
                            "on CPUs only with compile: true); else none, selective, full", "recompute")  # fmt: skip

    def _check_offload(self) -> None:
        if self.offload == "none":
            return
        if self.backend != "fsdp" or self.device != "cuda":
            raise Misplaced("offload cpu moves FSDP's shards off a GPU: backend fsdp and device cuda", "offload")
        if self.precision == "bf16-stochastic":
            raise Misplaced("offload cpu steps in the host's memory, where bf16-stochastic's 8-bit optimizer does not "
                            "run; fp32-master needs no GPU memory for its states then", "precision")  # fmt: skip


def load_hardware(tag: str, path: Path = HARDWARE_FILE, where: str = "") -> Hardware:
    """The row of a hardware tag. Raises `UserError` for an unknown one, with the nearest; `where` is who names it."""
    root = read_yaml(path)
    rows = {key.value: (key, value) for key, value in root.value}
    if tag not in rows:
        raise UserError(
            f"unknown hardware tag '{tag}'{nearest(tag, [*rows, AUTO])}",
            where=where or str(path),
            allowed=", ".join([*rows, AUTO]),
            todo=f"set `hardware:` in the run's file or pass --hardware; a new machine is one new row of {path}",
        )
    return validate(Hardware, rows[tag][1], path, prefix=(tag,))


def tags(path: Path = HARDWARE_FILE) -> list[str]:
    """The tags that have a row, in the file's order."""
    return [key.value for key, _ in read_yaml(path).value]


def place(hardware: Hardware) -> dict[str, Any]:
    """What every stage's order records of a row; how training uses the machine is for training's orders."""
    return hardware.model_dump(exclude_none=True, exclude=set(CHOSEN))


CHOSEN = ("precision", "recompute", "microbatch_rows", "offload", "compile", "on_oom")
