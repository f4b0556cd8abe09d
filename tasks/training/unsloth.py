"""The backend `unsloth`: one GPU, a model loaded and patched by Unsloth, its offloaded recomputation as a choice.

Unsloth goes first: it patches transformers and TRL when it is imported, so `start_process` imports it before anything
else of ours does. What it would decide is decided here or in `make_config`: it trains our rows in our order, with our
attention, loss, schedule and optimizer. A full fine-tune takes Unsloth's generic path, which compiles the pieces of a
layer one by one; we compile whole layers in its place (measured: README, "On GPUs, measured").

Never in one process with FSDP. Some of unsloth_zoo's files are under AGPL-3.0: an extra that one installs by name.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.errors import UserError
from tasks.training.fsdp import COPIES_QUEUE, full_tensors, rank, see_one_gpu, set_threads, world_size
from tasks.trust import trusted

if TYPE_CHECKING:
    from tasks.training.precision import Precision

__all__ = ["before_trainer", "check_wrapper", "full_tensors", "load_model", "rank", "set_threads", "shard",
           "start_process", "trainer_settings", "world_size"]  # fmt: skip

ENVIRONMENT = {
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "UNSLOTH_OFFLOAD_FP32": "exact",  # or its recomputation would round float32 activations to bf16
    "UNSLOTH_COMPILE_DISABLE": "1",  # its pieces; whole layers are compiled by `tasks.training.recompute`
}


def start_process(how: dict[str, Any]) -> None:
    """Import Unsloth. Raises `UserError` where it, or the one GPU that it wants, is missing."""
    if how.get("processes", 1) * how.get("nodes", 1) != 1 or world_size() != 1:
        raise UserError("the backend unsloth trains on one GPU", where="hardware.processes", allowed="1",
                        todo="use backend fsdp for several GPUs")  # fmt: skip
    if importlib.util.find_spec("unsloth") is None:
        raise UserError("the hardware tag asks for Unsloth, which is not installed", where="hardware.backend",
                        todo="pip install -e '.[unsloth]', or take a tag with backend fsdp")  # fmt: skip
    see_one_gpu()
    import torch

    if not torch.cuda.is_available():
        raise UserError("the hardware tag asks for a GPU, but torch finds none", where="how.device", allowed="cpu")
    os.environ.update(ENVIRONMENT)
    # Else it writes its generated modules into the working directory.
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(Path(tempfile.gettempdir()) / f"steep-unsloth-{os.getuid()}"))
    import unsloth  # noqa: F401


def load_model(folder: Path, precision: Precision, seq_len: int, how: dict[str, Any]) -> Any:
    """The model on the GPU, every weight trainable, in the policy's dtype."""
    from unsloth import FastLanguageModel

    from tasks.training.attention import choose_attention
    from tasks.training.model import read_config

    implementation = choose_attention(read_config(folder), seq_len)
    model, _ = FastLanguageModel.from_pretrained(
        str(folder),
        max_seq_length=seq_len,
        dtype=precision.weights,
        full_finetuning=True,
        load_in_4bit=False,
        load_in_8bit=False,
        use_gradient_checkpointing="unsloth" if how.get("recompute") == "unsloth" else False,
        use_exact_model_name=True,  # no mapping of names to Unsloth's mirrors
        local_files_only=True,
        trust_remote_code=trusted(),
    )
    model.set_attn_implementation(implementation)
    for trace in ("model_name", "unsloth_version"):  # a path of this machine, and a version: neither is the model's
        model.config.__dict__.pop(trace, None)
    for parameter in model.parameters():  # it keeps norms in float32, which its own compiled pieces would cast
        parameter.data = parameter.data.to(precision.weights)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert not frozen, f"Unsloth left {frozen} without a gradient"
    if not precision.autocasts:  # its trainer would otherwise turn autocast on for float32 weights
        os.environ["UNSLOTH_MIXED_PRECISION"] = "bfloat16"
    return model


def trainer_settings(how: dict[str, Any], precision: Precision) -> dict[str, Any]:
    """The trainer's settings for where it runs."""
    on = how.get("recompute") == "unsloth"
    recompute = {"gradient_checkpointing": on, "gradient_checkpointing_kwargs": {"use_reentrant": True} if on else None}
    return recompute | {"accelerator_config": dict(COPIES_QUEUE)}


def before_trainer(args: Any, precision: Precision) -> None:
    """Nothing to prepare."""


def shard(model: Any, accelerator: Any) -> bool:
    """Nothing to shard."""
    return False


def check_wrapper(model: Any) -> str:
    """`unsloth`: asserted by the marks that its loader leaves."""
    assert getattr(model, "_unsloth_full_finetuning", False), "the model was not loaded by Unsloth for a full fine-tune"
    return "unsloth"
