"""The backend `fsdp`: plain transformers in one process, FSDP2 in several (GPUs with NCCL, CPU processes with
gloo).

A backend is a module with these functions: `start_process` (before transformers is imported), `load_model`,
`set_threads`, `trainer_settings`, `before_trainer`, `shard`, `check_wrapper`, `full_tensors`. With several processes
each reads and holds its shard of weights, gradients and states; a checkpoint is sharded as well
(torch.distributed.checkpoint).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.errors import UserError
from tasks.progress import say
from tasks.stage import MEETING_VARIABLE
from tasks.threads import choose_threads

if TYPE_CHECKING:
    from tasks.training.precision import Precision

SECONDS_FOR_OTHERS = 1800  # that a process waits for the slowest; accelerate's own figure
COPIES_QUEUE = {"non_blocking": True}  # micro-batches go to the GPU behind what computes there; nobody waits for either


def world_size() -> int:
    """Processes of this run; torchrun says it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number among all."""
    return int(os.environ.get("RANK", "0"))


def sharded() -> bool:
    """Whether FSDP2 holds the weights: torchrun starts several processes, or a single one that offloads to the CPU."""
    return "LOCAL_RANK" in os.environ


def start_process(how: dict[str, Any]) -> None:
    """Set up this process: check the machine against the order, make results repeatable."""
    expected = how.get("processes", 1) * how.get("nodes", 1)
    if world_size() != expected:
        raise UserError(
            f"the order asks for {expected} processes, but {world_size()} run",
            where="how.processes",
            todo=f"start it with `torchrun --standalone --nproc-per-node {expected} -m tasks.training DIR`",
        )
    if how.get("offload") == "cpu" and not sharded():
        raise UserError("offload: cpu moves FSDP2's shards off the GPU, but torchrun did not start this",
                        where="how.offload", todo="start it with torchrun --standalone -m tasks.training")  # fmt: skip
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if expected == 1 and how["device"] == "cuda":
        see_one_gpu()
    import torch

    if how["device"] == "cuda":
        if not torch.cuda.is_available():
            raise UserError("the hardware tag asks for a GPU, but torch finds none", where="how.device", allowed="cpu")
        torch.backends.cudnn.deterministic = True
    else:
        torch.use_deterministic_algorithms(True)
        # A debugging aid that costs a write a tensor.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def see_one_gpu() -> None:
    """Hide all GPUs but the first visible one: a single process would be spread over all by `DataParallel`, in silence.

    Called before torch looks at the GPUs.
    """
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    os.environ["CUDA_VISIBLE_DEVICES"] = first


def set_threads(how: dict[str, Any], num_parameters: int) -> int:
    """Give this process as many CPU threads as the model is worth, within its share of the cores; returns how many."""
    import torch

    cores = max(1, len(os.sched_getaffinity(0)) // how.get("processes", 1))
    threads = int(how.get("threads") or choose_threads(num_parameters, cores, "train"))
    torch.set_num_threads(threads)
    return threads


def load_model(folder: Path, precision: Precision, seq_len: int, how: dict[str, Any]) -> Any:
    """The model in the policy's dtype, on this process's CPU; without its weights where `shard` will read them."""
    from tasks.training import loading, model

    if not sharded():
        return model.load_model(folder, precision, seq_len)
    return loading.load_for_shards(folder, precision, seq_len, say if rank() == 0 else lambda text: None)


def shard(model: Any, accelerator: Any) -> bool:
    """Shard a model that has no weights yet and read this process's part; whether there was anything to do."""
    from tasks.training import loading

    return loading.shard(model, accelerator)


def trainer_settings(how: dict[str, Any], precision: Precision) -> dict[str, Any]:
    """The trainer's settings for where it runs."""
    on_cpu = how["device"] == "cpu"
    settings: dict[str, Any] = {"use_cpu": on_cpu, "dataloader_pin_memory": not on_cpu}
    if not on_cpu:
        settings["accelerator_config"] = dict(COPIES_QUEUE)
    if sharded():
        settings["ddp_backend"] = "gloo" if on_cpu else "nccl"
        settings["fsdp"] = True
        settings["fsdp_config"] = {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",  # one unit a decoder layer
            "state_dict_type": "SHARDED_STATE_DICT",  # FULL_STATE_DICT aborts on gloo
            "reshard_after_forward": True,
            "cpu_ram_efficient_loading": False,
        }
        if how.get("offload") == "cpu":
            settings["fsdp_config"]["cpu_offload"] = True
            # accelerate reads these when it makes the group: the norm of gradients on the CPU needs gloo too.
            os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}
        if not on_cpu:
            settings["bf16"] = False  # FSDP2 casts the shards itself, see before_trainer
            # Without it a whole model of gradients is kept on every GPU until the last micro-batch of a step.
            settings["accelerator_config"]["gradient_accumulation_kwargs"] = {"sync_each_batch": True}
        if how.get("nodes", 1) == 1:
            offloads = how.get("offload") == "cpu" and not on_cpu
            _meet("cuda:nccl,cpu:gloo" if offloads else settings["ddp_backend"])
    return settings


def _meet(backend: str) -> None:
    """Make the process group of one node, with no socket beyond loopback; accelerate takes the one that it finds.

    Without the launcher (torchrun by hand) the processes still meet in torchrun's store, which listens everywhere.
    """
    import torch.distributed as dist

    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}
    folder = os.environ.get(MEETING_VARIABLE)
    if folder and not dist.is_initialized():
        patience = timedelta(seconds=SECONDS_FOR_OTHERS)
        store = dist.FileStore(f"{folder}/ranks", world_size())  # type: ignore[attr-defined]
        store.set_timeout(patience)
        dist.init_process_group(backend, store=store, rank=rank(), world_size=world_size(), timeout=patience)


def before_trainer(args: Any, precision: Precision) -> None:
    """FSDP2's own mixed precision on GPUs; and make accelerate shard on CPU too, where it takes DDP in silence."""
    if not sharded():
        return
    if not args.use_cpu:
        _cast_in_fsdp(args, precision)
        return
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, TorchDynamoPlugin

    assert args.device.type == "cpu"  # reading it starts the process group, and resets the state made below
    mixed_precision = "bf16" if args.bf16 else "no"
    plugin = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
    if args.bf16:
        plugin.set_mixed_precision(mixed_precision)
    # The state is a singleton: the trainer's Accelerator finds it made.
    state = AcceleratorState(
        mixed_precision=mixed_precision, cpu=True, dynamo_plugin=TorchDynamoPlugin(), _from_accelerator=True
    )
    state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
    PartialState().distributed_type = DistributedType.FSDP  # copied over the state's whenever that is looked up


def _cast_in_fsdp(args: Any, precision: Precision) -> None:
    """Gather in bf16 and reduce gradients in float32.

    accelerate's own policy would also reduce, and return the loss, in bf16. Against autocast, the activations
    between the layers are bf16 too, which halves what the layers keep.
    """
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if precision.computes_bf16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        args.fsdp_plugin_args["mixed_precision_policy"] = policy


def check_wrapper(model: Any) -> str:
    """`none` or `FSDP2`: what really wraps the model, asserted against what was asked for."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    if not sharded():
        return "none"
    whole = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    assert not whole, f"{whole} are not sharded"
    assert isinstance(model, FSDPModule), f"asked for FSDP2, got {type(model).__name__}"
    return "FSDP2"


def full_tensors(model: Any) -> Iterator[tuple[str, Any]]:
    """Every parameter once, whole and on the CPU of rank 0 (None elsewhere), one gathered at a time."""
    from torch.distributed.tensor import DTensor

    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        yield name, tensor.cpu() if rank() == 0 else None
    persistent = set(model.state_dict())
    for name, buffer in model.named_buffers():
        if name in persistent:
            yield name, buffer.detach().cpu() if rank() == 0 else None
