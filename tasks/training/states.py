"""What a checkpoint holds: weights, optimizer states and schedule, in one format for any number of processes.

    state/          torch.distributed.checkpoint: `model.NAME` and `optimizer.NAME.STATE`, one file a process
    schedule.pt     the state of the learning rate's schedule

Tensors are stored under their parameter's own name, with their place in the whole. So a checkpoint of two GPUs
resumes on one and the other way round: each process reads the parts that it holds, and none gathers the model.

The states of the random generators stay the trainer's: they are restored with as many processes as before.

Reading a checkpoint runs no code of its own: tensors and schedule are loaded with `weights_only`, and of the pickle in
which torch describes the tensors only its own descriptions are admitted.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from tasks.errors import UserError
from tasks.training.moments import Moment, agree, pack, place, unpack

STATE, SCHEDULE = "state", "schedule.pt"
METADATA = ".metadata"  # torch's name
# What METADATA may be made of, beside names of dtypes. Not `BytesStorageMetadata`: its content is unpickled freely.
DESCRIPTIONS = {
    *(("torch.distributed.checkpoint.metadata", name) for name in (
        "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "_MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13's name
}  # fmt: skip
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")  # names that compiling and recomputing put in between


@torch.no_grad()
def save_states(folder: Path, model: Any, optimizer: Any, scheduler: Any) -> None:
    """Write the states; called by every process."""
    tensors = model_tensors(model)
    for moment, quantized in agree(list_moments(model, optimizer)):
        tensors |= pack(moment, quantized)
    alone = not dist.is_initialized()
    with warnings.catch_warnings(), _failures_told():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # `no_dist` says so
        save(tensors, storage_writer=FileSystemWriter(folder / STATE), no_dist=alone)
    if alone or dist.get_rank() == 0:
        torch.save(scheduler.state_dict(), folder / SCHEDULE)


@torch.no_grad()
def load_states(folder: Path, model: Any, optimizer: Any, scheduler: Any) -> None:
    """Read the states into place; called by every process, however many saved them."""
    if not (folder / STATE / METADATA).is_file():
        raise UserError(f"the checkpoint holds no {STATE}/: an earlier version saved it", where=str(folder),
                        todo="start the stage over with --force")  # fmt: skip
    reader = StateReader(folder / STATE)
    stored = {name: tuple(entry.size) for name, entry in reader.read_metadata().state_dict_metadata.items()}  # type: ignore[union-attr]
    make_moments(optimizer)
    moments = []
    for moment in list_moments(model, optimizer):
        if moment.name in stored or f"{moment.name}.codes" in stored:
            moments.append(moment)
        else:  # no step had reached this parameter yet: all before the checkpoint were skipped
            optimizer.state.pop(moment.parameter, None)
    places = [place(moment, stored) for moment in moments]
    tensors = model_tensors(model)
    for placed in places:
        tensors |= placed
    with _failures_told():
        load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    for moment, placed in zip(moments, places, strict=True):
        unpack(moment, placed)
    scheduler.load_state_dict(torch.load(folder / SCHEDULE, map_location="cpu", weights_only=True))
    for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        set_rate(group, rate)


class StateReader(FileSystemReader):
    """torch's reader, whose own `read_metadata` is a bare `pickle.load`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the checkpoint holds. Raises `UserError` where its description asks for anything else."""
        file = Path(self.path) / METADATA
        with file.open("rb") as opened:
            metadata: Metadata = _Unpickler(opened).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.name = file.name

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if (module, name) in DESCRIPTIONS:
            return super().find_class(module, name)
        raise UserError(f"the checkpoint asks for {module}.{name}, which describes no tensor: we did not write it so",
                        where=self.name, todo="find out who did, and move the checkpoint away")  # fmt: skip


@contextmanager
def _failures_told() -> Iterator[None]:
    """What torch.distributed.checkpoint raises is no `Exception`: nobody would see that the disk is full."""
    try:
        yield
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if not isinstance(cause, Exception):  # a signal's
            raise cause from None
        raise RuntimeError(str(error)) from cause


def model_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Parameters (tied ones once) and the buffers that are stored with a model."""
    stored = set(model.state_dict())
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in stored]
    return {f"model.{plain_name(name)}": tensor.detach() for name, tensor in [*model.named_parameters(), *buffers]}


def list_moments(model: Any, optimizer: Any) -> list[Moment]:
    """Every state of the optimizer, under the name of its parameter; in the same order on every process."""
    found = []
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            name = plain_name(name)
            assert isinstance(value, torch.Tensor), f"{key} of {name} is no tensor"
            whole = value.ndim > 0 and not isinstance(value, DTensor)
            assert not (whole and isinstance(parameter, DTensor)), f"{key} of the sharded {name} is not sharded"
            found.append(Moment(f"optimizer.{name}.{key}", parameter, value))
    return found


def make_moments(optimizer: Any) -> None:
    """Let the optimizer make its states the way it does: by a step of zero gradients at a rate of zero."""
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper may leave a step out
    rates = [group["lr"] for group in inner.param_groups]
    for group in inner.param_groups:
        group["lr"] = group["lr"] * 0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    inner.step()
    for group, rate in zip(inner.param_groups, rates, strict=True):
        group["lr"] = rate
    inner.zero_grad(set_to_none=True)


def set_rate(group: dict[str, Any], rate: Any) -> None:
    """Set a group's learning rate where it lives; some optimizers keep it in a tensor."""
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def plain_name(name: str) -> str:
    """A parameter's name without the wrappers around its modules."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name
