"""Whether documents of a packed row are really apart: asked of the model itself, before its first step.

`tasks/layers.py` refuses by name what is known to mix them. A model may do so all the same: its class, or code that it
brings, may build a mask without the positions, and nothing of that stands in a config. So a short document goes
through the model twice, once behind its own copy, from which it could be told, and once behind another one: its losses
may not differ. Models of the families that the tests hold are not asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tasks.errors import UserError
from tasks.training.loss import token_losses

HELD_BY_TESTS = {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"}
DOCUMENT_TOKENS = 16
# Other tokens beside them round experts' products otherwise: 1e-7 in float32, a digit of the logits in bf16. A copy in
# sight changes the losses of a random model by 1e-3 and more, and takes most of a trained one's away.
NATS = {"float32": 1e-4, "bf16": 0.1}


def needs_probe(config: Any) -> bool:
    """Whether a model is none of those that the tests hold."""
    return config.get_text_config().model_type not in HELD_BY_TESTS


def check_isolation(model: Any, collate: Callable[[list[dict[str, Any]]], dict[str, Any]], bf16: bool) -> None:
    """Raise `UserError` where a document's losses depend on another one in its row; every process calls it.

    `bf16`: the matrix products are.
    """
    vocabulary, was_training = model.config.get_text_config().vocab_size, model.training
    document, other = np.random.default_rng(0).integers(vocabulary, size=(2, DOCUMENT_TOKENS))
    model.eval()
    losses = []
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # a shape of its own is not worth compiling
        for before in (document, other):
            losses.append(token_losses(model, collate([_row(before, document)]))[1][-DOCUMENT_TOKENS + 1 :])
    model.train(was_training)
    difference = float((losses[0] - losses[1]).abs().mean())
    if difference > NATS["bf16" if bf16 else "float32"]:  # NaN is no mixing: the first step tells of it
        raise UserError(
            f"documents of a packed row see each other in {type(model).__name__}: with another document before it, "
            f"the losses of one changed by {difference:.1g} nats a token",
            where="model.path",
            allowed="models that keep to the documents' positions, as Llama, Qwen3, Mistral and Gemma do",
            todo="take such a base",
        )


def _row(before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    ids = np.concatenate([before, after])
    return {"input_ids": ids, "labels": ids.copy(), "seq_lengths": np.full(2, DOCUMENT_TOKENS),
            "seq_sources": np.zeros(2)}  # fmt: skip
