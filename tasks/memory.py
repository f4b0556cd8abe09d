"""GPU memory of a training, by parts, from the model's config alone: what is planned before anything loads.

A step has five moments at which memory may peak: the loss (everything kept for the backward pass stands), the backward
pass's first layer and its last (gradients have grown, what was kept is gone), the embedding's gradient, and the
optimizer's step. Each is added up from first principles, bytes of tensors that torch allocates; the largest is the
prediction. What cannot be counted from outside stands in `COEFFICIENTS`, fitted to measured peaks
(`configs/measurements/`; `python -m tests.benchmarks.plan` compares).

Not counted: the CUDA context and fragmentation (the plan's headroom is for them).
Letters as in tasks/model_shape.py, and T tokens of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from tasks.model_shape import ModelShape

GIB = 2**30
# Bytes a parameter: weights, gradients, the optimizer's states (8 bit: one byte each, and a float32 scale for 256).
STATE_BYTES = {
    "fp32": (4.0, 4.0, 8.0),
    "fp32-master": (4.0, 4.0, 8.0),
    "bf16-stochastic": (2.0, 2.0, 2 + 2 * 4 / 256),
    "bf16": (2.0, 2.0, 4.0),
}
CHUNK_LOGITS = 2**30  # as tasks/training/linear_loss.py: logits that exist at a time
KEEPING_PRODUCTS = ("none", "pointwise")  # of `recompute`: no product of a layer is computed again
COEFFICIENTS = {
    # Temporary values while a layer is differentiated, in elements of F: the MLP's product again, and the gradients of
    # the product, of gate and of up. Measured at 65,536 tokens of a 1B model: 4.2.
    "layer_gradients": 4.0,
    # Layers gathered at a time under FSDP2: the one in work and the next.
    "gathered_layers": 2.0,
}


@dataclass(frozen=True)
class Setting:
    """How a stage trains, as far as memory depends on it."""

    backend: str
    precision: str
    recompute: str
    microbatch_rows: int
    seq_len: int
    world_size: int = 1
    offload: str = "none"
    accumulation: int = 1  # micro-batches a step
    compile: bool = True  # compiled layers

    @property
    def tokens(self) -> int:
        """T: tokens of a micro-batch."""
        return self.microbatch_rows * self.seq_len


@dataclass(frozen=True)
class Parts:
    """Bytes on one GPU at the moment of the peak."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    workspace: float
    moment: str = ""

    @property
    def total(self) -> float:
        """All parts together."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.workspace

    def as_gib(self) -> dict[str, float]:
        """Part -> GiB."""
        return {part.name: getattr(self, part.name) / GIB for part in fields(self) if part.name != "moment"}


def predict(shape: ModelShape, setting: Setting) -> Parts:
    """Memory at the peak, on one GPU."""
    return max(moments(shape, setting), key=lambda parts: parts.total)


def moments(shape: ModelShape, setting: Setting) -> list[Parts]:
    """Memory at each moment that may be the peak."""
    weights, gradients, optimizer = _states(shape, setting)
    held = gradients if setting.accumulation > 1 else 0.0  # the first micro-batch's gradients stand during the second
    kept, layer, ends = _kept(shape, setting), _kept_by_a_layer(shape, setting), _ends(shape, setting)
    recomputed = 0.0 if setting.recompute in KEEPING_PRODUCTS else max(0.0, layer - kept / shape.num_layers)
    temporary, copies, root = _layer_gradients(shape, setting), _copies(shape, setting), _root(shape, setting)
    on_way = kept if setting.recompute == "unsloth" else 0.0  # buffers between GPU and host
    work, head = copies + _gathered(shape, setting) + root, _head_gradient(shape, setting)
    return [
        Parts(weights, held, optimizer, kept + ends, _loss(shape, setting), copies + root, "loss"),
        Parts(weights, held, optimizer, kept + ends + recomputed + temporary, head, work, "backward, first layer"),
        Parts(weights, gradients, optimizer, layer + on_way + temporary, 0.0, work, "backward, last layer"),
        Parts(weights, gradients, optimizer, 0.0, 0.0, root + _root_gradients(shape, setting), "embedding's gradient"),
        Parts(weights, gradients, optimizer, 0.0, 0.0, 0.0, "optimizer step"),
    ]


# --- what does not depend on the tokens ------------------------------------------------------------------------------


def _states(shape: ModelShape, setting: Setting) -> tuple[float, float, float]:
    """Weights, gradients and optimizer on one GPU: its shard, or nothing when they live on the host."""
    if setting.offload == "cpu":
        return 0.0, 0.0, 0.0
    weights, gradients, optimizer = (b * shape.parameters / setting.world_size for b in STATE_BYTES[setting.precision])
    return weights, gradients, optimizer


def _is_sharded(setting: Setting) -> bool:
    return setting.world_size > 1 or setting.offload == "cpu"


def _autocasts(setting: Setting) -> bool:
    """Float32 weights with bf16 products in one process; FSDP2 casts what it gathers instead."""
    return setting.precision == "fp32-master" and not _is_sharded(setting)


def _copies(shape: ModelShape, setting: Setting) -> float:
    """Autocast's bf16 copies of float32 weights: of the layer in work; not compiled, all of them are kept."""
    if not _autocasts(setting):
        return 0.0
    return 2.0 * shape.layer_parameters * (1 if setting.compile or setting.recompute != "none" else shape.num_layers)


def _gathered(shape: ModelShape, setting: Setting) -> float:
    """Under FSDP2 the layers in work, whole: their weights, the gradients of one and the float32 it is reduced in."""
    if not _is_sharded(setting):
        return 0.0
    width = _product_bytes(setting)
    return (COEFFICIENTS["gathered_layers"] * width + width + 4.0) * shape.layer_parameters


def _root(shape: ModelShape, setting: Setting) -> float:
    """FSDP2 gathers embedding, last layer and last norm for the whole pass."""
    return _product_bytes(setting) * shape.outside_parameters if _is_sharded(setting) else 0.0


def _root_gradients(shape: ModelShape, setting: Setting) -> float:
    """Their gradients come last, whole, and are reduced in float32."""
    return (_product_bytes(setting) + 4.0) * shape.outside_parameters if _is_sharded(setting) else 0.0


# --- what grows with the tokens --------------------------------------------------------------------------------------


def _product_bytes(setting: Setting) -> float:
    """Of a number in a matrix product."""
    return 4.0 if setting.precision == "fp32" else 2.0


def stream_bytes(setting: Setting) -> float:
    """Of a number between the layers: autocast leaves the residual stream in float32."""
    return 4.0 if setting.precision == "fp32" or _autocasts(setting) else 2.0


def _kept_by_a_layer(shape: ModelShape, setting: Setting) -> float:
    """What one layer keeps for its backward pass when no product and no attention is computed again.

    Compiled: the residual stream before both norms, queries, keys and values, the attention's output and its
    statistics, gate and up; with `none` the norms' results and the MLP's product too (tasks/training/recompute.py).
    Not compiled also the norms' values in float32, normalised and scaled, the attention's output in another layout, two
    more of the MLP, and in float32 the key's and value's heads repeated.
    """
    product, stream = _product_bytes(setting), stream_bytes(setting)
    elements = 2 * shape.queries + 2 * shape.keys + 2 * shape.mlp
    normed = shape.queries + shape.keys if shape.norms_queries_and_keys else 0
    elements += normed  # queries and keys before their norms
    a_token = elements * product + 2 * shape.hidden * stream + 4 * shape.heads
    if setting.compile and setting.recompute == "none":
        a_token += (2 * shape.hidden + shape.mlp) * product
    if not setting.compile:
        widened = 4.0 if product < 4 else 0.0
        a_token += (2 * shape.hidden + normed) * (2 * product + widened)
        repeated = 2 * (shape.queries - shape.keys) if product == 4 else 0
        a_token += (repeated + shape.queries + 2 * shape.mlp) * product
    return setting.tokens * a_token


def _kept(shape: ModelShape, setting: Setting) -> float:
    """What all layers keep until their backward pass."""
    stream, product = stream_bytes(setting) * shape.hidden, _product_bytes(setting)
    if setting.recompute in KEEPING_PRODUCTS:
        return shape.num_layers * _kept_by_a_layer(shape, setting)
    if setting.recompute == "unsloth":  # inputs of layers go to the host; the one in work and the next are here
        return 2 * setting.tokens * stream
    a_token = stream
    if setting.recompute == "selective":  # the attention's output, and q, v and gate of the products
        a_token += (2 * shape.queries + shape.keys + shape.mlp) * product + 4 * shape.heads
    return shape.num_layers * setting.tokens * a_token


def _layer_gradients(shape: ModelShape, setting: Setting) -> float:
    """Gradients of activations while one layer is differentiated; last that of the stream."""
    elements = COEFFICIENTS["layer_gradients"] * shape.mlp + shape.hidden
    return setting.tokens * elements * _product_bytes(setting)


def _ends(shape: ModelShape, setting: Setting) -> float:
    """The last norm's input and output, and those of its rows that have a target."""
    return setting.tokens * shape.hidden * (stream_bytes(setting) + 2 * _product_bytes(setting))


def _loss(shape: ModelShape, setting: Setting) -> float:
    """The chunked loss.

    Forward: the logits of a chunk, which become their gradients, and the last layer's gradient in float32.
    Backward: that gradient, and cast.
    """
    width, head = _product_bytes(setting), float(shape.embedding)
    rows = max(64, 1 << (CHUNK_LOGITS // shape.vocabulary).bit_length() - 1)
    chunk = min(setting.tokens, rows) * shape.vocabulary * width
    cast = width * head if _autocasts(setting) else 0.0
    return max(4.0 * head + chunk, (4.0 + width) * head) + cast + setting.tokens * shape.hidden * width


def _head_gradient(shape: ModelShape, setting: Setting) -> float:
    """The last layer's gradient as the backward pass begins, and that of the hidden states."""
    return STATE_BYTES[setting.precision][1] * shape.embedding + setting.tokens * shape.hidden * _product_bytes(setting)


def setting_of(row: dict[str, Any]) -> Setting:
    """The setting of a measured run."""
    processes = row.get("processes", 1)
    accumulation = max(1, row["rows_per_step"] // (row["microbatch_rows"] * processes))
    return Setting(
        row["backend"],
        row["precision"],
        row["recompute"],
        row["microbatch_rows"],
        row["seq_len"],
        processes,
        row.get("offload", "none"),
        accumulation,
        row.get("compile", True),
    )
