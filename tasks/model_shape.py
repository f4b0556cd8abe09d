"""What a model's `config.json` says about its size: widths, layers, parameters. Loads neither torch nor transformers.

The parameters are counted from the widths, as the decoder models of this family are built: llama, mistral, qwen2,
qwen3, gemma. Where safetensors lie beside the config, their headers are counted: exact for any model.

Letters: H hidden width, F width of the MLP, Q and K widths of all query and key heads, V vocabulary, L layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tasks.errors import UserError
from tasks.model_files import read_index, read_model_json, read_tensors

NORMS_A_LAYER = {"gemma2": 4, "gemma3_text": 4, "gemma3": 4}  # the others: before the attention and before the MLP
NORMS_OF_QUERIES_AND_KEYS = ("qwen3", "gemma3_text", "gemma3")
BIASES_OF_QUERIES_KEYS_VALUES = ("qwen2",)
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # in place of one MLP a layer


@dataclass(frozen=True)
class ModelShape:
    """Widths, and numbers of parameters."""

    hidden: int  # H
    mlp: int  # F
    queries: int  # Q: heads x their width
    keys: int  # K, also the values' width
    heads: int
    vocabulary: int  # V
    num_layers: int  # L
    tied: bool  # the last layer is the embedding
    layer_parameters: int
    parameters: int
    norms_queries_and_keys: bool = False  # before the attention

    @property
    def embedding(self) -> int:
        """Parameters of the embedding; as many stand in an untied last layer."""
        return self.vocabulary * self.hidden

    @property
    def outside_parameters(self) -> int:
        """Embedding, last layer and last norm: what belongs to no decoder layer."""
        return self.parameters - self.num_layers * self.layer_parameters

    def flops_per_token(self, mean_context: float) -> float:
        """Model FLOPs, forward and backward: 6 a parameter of the matrices, 12 a layer, width and position of context.

        The embedding's look-up is no product, the last layer is. Recomputation does not count.
        """
        layer = self.hidden * (2 * self.queries + 2 * self.keys + 3 * self.mlp)
        products = self.num_layers * layer + self.vocabulary * self.hidden
        return 6.0 * products + 12.0 * self.num_layers * self.queries * mean_context


def read_shape(folder: Path) -> ModelShape:
    """The shape of a model's folder; exact where its weights lie there. Raises `UserError` for what it cannot read."""
    shape = shape_of(read_model_json(folder / "config.json", "model.path"), str(folder / "config.json"))
    sizes = tensor_sizes(folder)
    if not sizes or not _is_whole(folder, sizes):
        return shape
    in_layers = sum(size for name, size in sizes.items() if ".layers." in name)
    layer = in_layers // shape.num_layers if in_layers else shape.layer_parameters
    tied = not any(name.endswith("lm_head.weight") for name in sizes)
    return replace(shape, parameters=sum(sizes.values()), layer_parameters=layer, tied=tied)


def shape_if_known(folder: Path) -> ModelShape | None:
    """The shape; None for a model that is none of these families, for which nothing is planned."""
    try:
        return read_shape(folder)
    except UserError:
        return None


def _is_whole(folder: Path, sizes: dict[str, int]) -> bool:
    """Whether every tensor that the index names is there; a cache may hold some of the shards."""
    return set(read_index(folder, "model.path")) <= set(sizes)


def shape_of(config: dict[str, Any], where: str = "config.json") -> ModelShape:
    """The shape that a config describes."""
    config = config.get("text_config") or config
    try:
        hidden, mlp, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
        heads, vocabulary = config["num_attention_heads"], config["vocab_size"]
    except KeyError as missing:
        raise UserError(
            f"the config does not say {missing}, so memory and time cannot be planned",
            where=where,
            allowed="decoder models that call their sizes as Llama, Qwen, Mistral and Gemma do",
        ) from None
    if any((config.get(name) or 1) > 1 for name in EXPERTS):
        raise UserError("the layers hold experts, whose memory and time are not planned", where=where,
                        allowed="dense decoder models")  # fmt: skip
    head = config.get("head_dim") or hidden // heads
    queries, keys = heads * head, (config.get("num_key_value_heads") or heads) * head
    kind = config.get("model_type", "llama")
    tied = config.get("tie_word_embeddings", kind.startswith("gemma"))
    layer = hidden * (2 * queries + 2 * keys + 3 * mlp) + hidden * NORMS_A_LAYER.get(kind, 2)
    if kind in NORMS_OF_QUERIES_AND_KEYS:
        layer += 2 * head
    if kind in BIASES_OF_QUERIES_KEYS_VALUES or config.get("attention_bias"):
        layer += queries + 2 * keys + (hidden if config.get("attention_bias") else 0)
    if config.get("mlp_bias"):
        layer += 2 * mlp + hidden
    parameters = layers * layer + vocabulary * hidden * (1 if tied else 2) + hidden
    norms = kind in NORMS_OF_QUERIES_AND_KEYS
    return ModelShape(hidden, mlp, queries, keys, heads, vocabulary, layers, tied, layer, parameters, norms)


def tensor_sizes(folder: Path) -> dict[str, int]:
    """Names and numbers of elements of a folder's safetensors, from their headers; empty without any."""
    sizes: dict[str, int] = {}
    for file in sorted(folder.glob("*.safetensors")):
        sizes |= {name: math.prod(tensor["shape"]) for name, tensor in read_tensors(file, "model.path").items()}
    return sizes
