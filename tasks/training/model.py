"""The model to start from: checked before it is loaded, loaded in float32, with rows for the tokenizer's new
tokens.

Checked first, from files alone: safetensors (pickled weights are refused: loading them runs code), the
positions against `seq_len`, the tokenizer against the embedding, and the disk against the checkpoints to
come.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from tasks.errors import UserError
from tasks.layers import check_layers
from tasks.model_shape import tensor_sizes
from tasks.room import check_disk
from tasks.stage import Order
from tasks.training.attention import choose_attention
from tasks.training.linear_loss import can_fuse, fuse_loss
from tasks.training.precision import Precision
from tasks.training.recompute import wrap_layers
from tasks.trust import trusted

PENDING = "steep_pending"  # the attribute of a model whose weights are still in its files (tasks/training/loading.py)
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


def resolve_init(order: Order) -> Path:
    """The folder of the model to start from; what a hub id names was fetched before we were started."""
    folder = Path(order.inputs["init"])
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no model folder: it holds no config.json", where="model.path",
                        allowed="a folder with config.json, *.safetensors and tokenizer files")  # fmt: skip
    return folder


def check_init(folder: Path, seq_len: int, directory: Path, keep_last: int, precision: str = "fp32") -> None:
    """Everything about the model that can be refused before it is loaded."""
    if not list(folder.glob("*.safetensors")):
        pickled = sorted(file.name for pattern in PICKLED for file in folder.glob(pattern))
        what = f"holds pickled weights only ({', '.join(pickled)})" if pickled else "holds no weights"
        raise UserError(f"{folder} {what}", allowed="*.safetensors",
                        todo="convert them where you trust the file: load it and `save_pretrained`")  # fmt: skip
    config = read_config(folder).get_text_config()
    check_layers(config.to_dict(), str(folder / "config.json"))
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and seq_len > positions:
        raise UserError(f"seq_len is {seq_len}, but the model has {positions} positions", where="model.seq_len",
                        allowed=f"up to {positions}", todo="lower model.seq_len")  # fmt: skip
    check_disk(directory, sum(tensor_sizes(folder).values()), precision, keep_last)


def read_config(folder: Path) -> Any:
    """The model's config. Raises `UserError` for one that only the model's own code, which may not run, understands."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trusted())
    except ValueError as error:
        raise UserError(f"the model's config does not load: {str(error).strip().splitlines()[0]}",
                        where=str(folder / "config.json"), allowed="an architecture that transformers knows",
                        todo="model.trust_remote_code: true runs the code that it brings") from error  # fmt: skip


def load_tokenizer(folder: Path, init: Path, added_tokens: list[str]) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """The run's tokenizer, and those of its added tokens that the model to start from has not seen."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted())
    num_rows = _embedding_rows(init)
    highest = max(tokenizer.get_vocab().values())
    added_ids = {tokenizer.get_vocab()[token] for token in added_tokens}
    known = set(tokenizer.get_vocab().values()) - added_ids
    if num_rows is not None and max(known) >= num_rows:
        raise UserError(
            f"tokenizer and model are of different vocabulary: the tokenizer's ids reach {highest}, the model has "
            f"{num_rows} embedding rows",
            where=str(init),
            allowed="a tokenizer whose ids all have a row (tokens that a chat template adds get new ones)",
            todo="use the tokenizer that belongs to the model",
        )
    if not added_tokens:
        return tokenizer, []
    has_tokenizer = any((init / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    seen = AutoTokenizer.from_pretrained(init, trust_remote_code=trusted()).get_vocab() if has_tokenizer else {}
    return tokenizer, [token for token in added_tokens if token not in seen]


def load_model(folder: Path, precision: Precision, seq_len: int) -> PreTrainedModel:
    """The model in the policy's dtype; said explicitly, or a bf16 copy would cut a float32 hand-over short."""
    transformers_logging.disable_progress_bar()
    implementation = choose_attention(read_config(folder), seq_len)
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=precision.weights,
        attn_implementation=implementation,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=trusted(),
    )


def is_rounded(folder: Path, precision: Precision) -> bool:
    """Whether loading rounds float32 weights, as a base may have them, or a stage that was trained at another tag."""
    if precision.weights is torch.float32:
        return False
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            if any(tensors.get_slice(name).get_dtype() == "F32" for name in tensors.keys()):  # noqa: SIM118
                return True
    return False


def prepare_model(model: PreTrainedModel, how: dict[str, Any]) -> None:
    """Recomputation, compilation and the fused loss, as the order's `how` says; a CPU keeps the model's own way."""
    recompute = how.get("recompute", "none")
    if recompute != "none" or how.get("compile", False):
        wrap_layers(model, "pointwise" if recompute == "unsloth" else recompute, how.get("compile", False))
    if how["device"] == "cuda" and can_fuse(model):
        fuse_loss(model)


def add_token_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, new_tokens: list[str]) -> int:
    """Give each new token the mean of the other tokens' rows, in both embeddings; returns how many got one."""
    if not new_tokens:
        return 0
    new_ids = sorted(tokenizer.get_vocab()[token] for token in new_tokens)
    old_ids = sorted(set(tokenizer.get_vocab().values()) - set(new_ids))
    inputs: Any = model.get_input_embeddings()
    if new_ids[-1] >= inputs.weight.shape[0]:  # else the vocabulary was padded and has room
        model.resize_token_embeddings(new_ids[-1] + 1, mean_resizing=False)
    if pending := getattr(model, PENDING, None):  # its rows are not read yet
        pending.new_ids, pending.old_ids = new_ids, old_ids
        return len(new_ids)
    embeddings: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    with torch.no_grad():
        for weight in {id(e.weight): e.weight for e in embeddings if e is not None}.values():  # tied: once
            weight[new_ids] = weight[old_ids].mean(dim=0)
    return len(new_ids)


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a folder's safetensors, from their headers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return shapes


def _embedding_rows(folder: Path) -> int | None:
    found = [shape[0] for name, shape in tensor_shapes(folder).items() if name.endswith(EMBEDDINGS)]
    said = json.loads((folder / "config.json").read_text()).get("vocab_size")
    return found[0] if found else said


def describe(model: Any) -> str:
    """One line about a loaded model."""
    num_parameters = sum(p.numel() for p in model.parameters())
    return f"{num_parameters:,} parameters, {model.config.model_type}, attention {model.config._attn_implementation}"
