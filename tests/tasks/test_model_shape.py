"""Parameters counted from a config, against the real thing: models that transformers builds, and published sizes."""

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import UserError
from tasks.model_shape import read_shape, shape_of, tensor_sizes
from tests.conftest import ROOT

COMMON: dict[str, Any] = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
                          "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"head_dim": 32},
    "qwen2": {},
    "qwen3": {"head_dim": 32, "tie_word_embeddings": True},
    "gemma": {"head_dim": 32},
    "gemma2": {"head_dim": 32},
    "gemma3_text": {"head_dim": 32},
}


@pytest.mark.parametrize("name", MODELS)
def test_a_config_gives_the_models_own_number_of_parameters(name: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(name.split(",")[0], **COMMON | MODELS[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path)
    shape = read_shape(tmp_path)  # no weights beside it
    assert shape.parameters == model.num_parameters()
    in_a_layer = sum(p.numel() for p in model.get_decoder().layers[0].parameters())
    assert shape.layer_parameters == in_a_layer
    assert shape.tied == config.tie_word_embeddings


def test_weights_that_lie_there_are_counted_exactly() -> None:
    base = ROOT / "data/regulator/base"
    shape = read_shape(base)
    assert shape.parameters == sum(tensor_sizes(base).values())
    assert shape.parameters == shape_of(json.loads((base / "config.json").read_text())).parameters


LLAMA = {"model_type": "llama", "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": False}
# (config, parameters that its makers state)
PUBLISHED = {
    "Llama 3.1 8B": (LLAMA | {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32}, 8_030_261_248),
    "Llama 3.1 70B": (LLAMA | {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64}, 70_553_706_496),
    "Qwen3 0.6B": ({"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "head_dim": 128, "num_attention_heads": 16,
                    "num_key_value_heads": 8, "vocab_size": 151_936, "tie_word_embeddings": True}, 596_049_920),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    config, parameters = PUBLISHED[name]
    assert shape_of(config).parameters == parameters


def test_flops_are_those_that_torch_counts() -> None:
    """Forward is a third; eager attention computes the whole square, so each token's context is the row."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("qwen3", **COMMON, head_dim=32, attn_implementation="eager")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    tokens = 48
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, tokens, dtype=torch.long, device="meta"))
    expected = shape_of(config.to_dict()).flops_per_token(tokens) / 3 * tokens
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3)  # and the angles of the positions


def test_a_config_that_does_not_say_its_widths_is_told() -> None:
    with pytest.raises(UserError, match="does not say 'intermediate_size'"):
        shape_of({"hidden_size": 64, "model_type": "odd"})


def test_experts_are_not_planned_as_one_mlp() -> None:
    dense = PUBLISHED["Llama 3.1 8B"][0]
    with pytest.raises(UserError, match="experts"):
        shape_of(dense | {"num_local_experts": 8})
    assert shape_of(dense | {"num_local_experts": 0, "num_experts": None}) == shape_of(dense)


def test_a_file_that_is_no_safetensors_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["Qwen3 0.6B"][0]))
    (tmp_path / "model.safetensors").write_bytes((900).to_bytes(8, "little") + b"{")
    with pytest.raises(UserError, match="cut short"):
        read_shape(tmp_path)
