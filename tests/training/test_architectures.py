"""Other architectures than Llama take the same road, each with the attention that it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tasks.training.metrics import read_metrics
from tests.training.conftest import SEQ_LEN, VOCAB_SIZE, make_stage, make_tokenizer, train_here

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("architecture", "more", "attention"),
    [
        ("qwen3", {"head_dim": 16}, "steep_isolated"),
        ("mistral", {"sliding_window": SEQ_LEN // 4}, "sdpa"),
        ("gemma2", {"head_dim": 8, "sliding_window": SEQ_LEN // 4}, "sdpa"),
    ],
)
def test_an_architecture_trains_and_packs_without_mixing(
    tmp_path: Path, prepared: Path, architecture: str, more: dict[str, Any], attention: str
) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        architecture, vocab_size=VOCAB_SIZE, num_key_value_heads=2, max_position_embeddings=SEQ_LEN, eos_token_id=1,
        **SIZES, **more,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "init")
    make_tokenizer().save_pretrained(tmp_path / "init")
    losses = []
    for microbatch_rows in (1, 4):  # documents that saw others would see more of them in a larger micro-batch
        directory = make_stage(
            tmp_path / str(microbatch_rows), tmp_path / "init", prepared, {"microbatch_rows": microbatch_rows}
        )
        assert train_here(directory)["attention"] == attention
        losses.append([line["loss"] for line in read_metrics(directory)])
        AutoModelForCausalLM.from_pretrained(directory / "model")
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)
