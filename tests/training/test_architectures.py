"""Other architectures than Llama take the same road, each with the attention that it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

from tasks.errors import UserError
from tasks.layers import CROSS_BORDERS, check_layers
from tasks.training import model as training_model
from tasks.training.attention import attention_plan, choose_attention
from tasks.training.isolation import HELD_BY_TESTS, check_isolation, needs_probe
from tasks.training.metrics import read_metrics
from tasks.training.rows import make_collate
from tests.training.conftest import SEQ_LEN, VOCAB_SIZE, make_stage, make_tokenizer, train_here

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def make_init(folder: Path, architecture: str, more: dict[str, Any]) -> Path:
    """A tiny random model of an architecture, with its tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        architecture, vocab_size=VOCAB_SIZE, num_key_value_heads=2, max_position_embeddings=SEQ_LEN, eos_token_id=1,
        **SIZES, **more,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("architecture", "more", "attention"),
    [
        ("qwen3", {"head_dim": 16}, "steep_isolated"),
        ("mistral", {"sliding_window": SEQ_LEN // 4}, "sdpa"),
        ("gemma2", {"head_dim": 8, "sliding_window": SEQ_LEN // 4}, "sdpa"),
        ("olmo2", {}, "steep_isolated"),  # none of ours, so asked first whether it keeps documents apart
        ("granitemoe", {"num_local_experts": 4}, "steep_isolated"),
    ],
)
def test_an_architecture_trains_and_packs_without_mixing(
    tmp_path: Path, prepared: Path, architecture: str, more: dict[str, Any], attention: str
) -> None:
    init = make_init(tmp_path / "init", architecture, more)
    assert needs_probe(AutoConfig.from_pretrained(init)) == (architecture in ("olmo2", "granitemoe"))
    losses = []
    for microbatch_rows in (1, 4):  # documents that saw others would see more of them in a larger micro-batch
        directory = make_stage(tmp_path / str(microbatch_rows), init, prepared, {"microbatch_rows": microbatch_rows})
        assert train_here(directory)["attention"] == attention
        losses.append([line["loss"] for line in read_metrics(directory)])
        AutoModelForCausalLM.from_pretrained(directory / "model")
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)


@pytest.mark.parametrize("sliding_window", [None, 4])
@pytest.mark.parametrize("architecture", sorted(HELD_BY_TESTS))
def test_a_family_that_is_not_probed_keeps_documents_apart(
    tmp_path: Path, architecture: str, sliding_window: int | None
) -> None:
    init = make_init(tmp_path, architecture, {"head_dim": 8, "sliding_window": sliding_window or SEQ_LEN})
    attention = choose_attention(AutoConfig.from_pretrained(init), SEQ_LEN)
    model = AutoModelForCausalLM.from_pretrained(init, attn_implementation=attention)
    check_isolation(model, make_collate(attention_plan(attention, "cpu")), bf16=False)
    with pytest.raises(UserError, match="see each other"):  # one document, as if its border were not there
        whole = make_collate(attention_plan(attention, "cpu"))
        check_isolation(
            model, lambda rows: whole([rows[0] | {"seq_lengths": rows[0]["seq_lengths"].sum()[None]}]), False
        )


CROSSING = {  # tiny models in which a document sees the one before it
    "qwen3_5_text": {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4,
                     "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "falcon": {},
}  # fmt: skip


@pytest.mark.parametrize("architecture", CROSSING)
def test_a_model_whose_documents_see_each_other_is_refused(
    tmp_path: Path, prepared: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what its config says, and where nothing is known of it by what it does."""
    directory = make_stage(tmp_path, make_init(tmp_path / "init", architecture, CROSSING[architecture]), prepared)
    layers = "a falcon" if architecture == "falcon" else "layers of linear_attention"
    with pytest.raises(UserError, match=f"the model (is|has) {layers}, in which the documents .* see each other"):
        train_here(directory)
    monkeypatch.setattr(training_model, "check_layers", lambda config, where: None)
    with pytest.raises(UserError, match="with another document before it, the losses of one changed by"):
        train_here(directory)
    assert read_metrics(directory) == [] and not (directory / "model").exists()


def test_every_stateful_model_of_transformers_is_refused_with_and_without_a_list_of_its_layers() -> None:
    stateful = {
        config.model_type: config
        for config, model in MODEL_FOR_CAUSAL_LM_MAPPING.items()
        if getattr(model, "_is_stateful", False)
    }
    assert stateful.keys() <= CROSS_BORDERS and len(stateful) > 15, "transformers has new ones: see tasks/layers.py"
    for name, config in stateful.items():
        for said in (config().to_dict(), {"model_type": name}, {"text_config": {"model_type": name}}):
            with pytest.raises(UserError, match="see each other"):
                check_layers(said, "model.path")


def test_convolutions_are_refused_and_layers_that_keep_documents_apart_pass() -> None:
    for mixing in ({"layer_types": ["conv", "full_attention"]}, {"model_type": "lfm2", "full_attn_idxs": [1]},
                   {"model_type": "llama4_text", "layer_types": ["chunked_attention", "full_attention"]}):  # fmt: skip
        with pytest.raises(UserError, match="see each other"):
            check_layers(mixing, "model.path")
    for said in (["attention"] * 3, ["full_attention", "sliding_attention"], ["moe", "mlp"]):
        check_layers({"model_type": "granitemoehybrid", "layers_block_type": said}, "model.path")
    check_layers({"model_type": "llama", "layer_types": None}, "model.path")
