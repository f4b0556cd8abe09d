"""A model read by shards is the model read whole, bit for bit, in less memory; real processes over gloo.

Loaded whole is the same model with one more tensor in its files: they do not name the model's one to one then.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from tasks.stage import read_artifact
from tasks.training.loading import is_pending, load_for_shards
from tasks.training.precision import precision_policy
from tests.benchmarks.loading import make_folder, measure
from tests.training.conftest import (
    SEQ_LEN,
    VOCAB_SIZE,
    make_documents,
    make_model,
    make_prepared,
    make_stage,
    make_tokenizer,
    pack,
    run_worker,
    weights,
)

NEW_TOKENS = ["<|turn|>", "<|end|>"]
WHOLE = "every process reads the whole model into memory"


def with_a_stranger(folder: Path, copy: Path) -> Path:
    """The same model, and a tensor that is none of its."""
    shutil.copytree(folder, copy)
    file = sorted(copy.glob("*.safetensors"))[0]
    save_file(load_file(file) | {"stranger.weight": torch.zeros(2)}, file, {"format": "pt"})
    index = copy / "model.safetensors.index.json"
    if index.is_file():
        said = json.loads(index.read_text())
        said["weight_map"]["stranger.weight"] = file.name
        index.write_text(json.dumps(said))
    return copy


def in_two_files_of_bf16(folder: Path) -> Path:
    """An untied model as the hub has them; loading widens it."""
    model = AutoModelForCausalLM.from_pretrained(make_model(folder, tied=False), dtype=torch.bfloat16)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size=30_000)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def tied_with_narrow_norms(folder: Path) -> Path:
    """Norms of four elements: of three processes the last one holds nothing of them."""
    config = AutoConfig.for_model(
        "qwen3", vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=4, max_position_embeddings=SEQ_LEN,
        tie_word_embeddings=True, eos_token_id=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def with_new_tokens(folder: Path) -> Path:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": NEW_TOKENS})
    return make_prepared(folder, pack(make_documents(60))[:12], tokenizer, NEW_TOKENS)


@pytest.mark.parametrize(
    ("make", "processes"),
    [(in_two_files_of_bf16, 2), pytest.param(tied_with_narrow_norms, 3, marks=pytest.mark.slow)],
)
def test_a_training_that_read_shards_is_that_which_read_all(make: Any, processes: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = make(tmp_path / "base")
    prepared, trained = with_new_tokens(tmp_path / "prepare_cpt-test"), {}
    for way, init in (("shards", base), ("whole", with_a_stranger(base, tmp_path / "stranger"))):
        directory = make_stage(tmp_path / way, init, prepared, {"processes": processes})
        assert run_worker(directory, processes) == 0, (directory / "worker.log").read_text()
        assert (WHOLE in (directory / "worker.log").read_text()) == (way == "whole")
        counts = read_artifact(directory)["counts"]
        assert (counts["wrapper"], counts["new_embedding_rows"]) == ("FSDP2", 2)
        trained[way] = weights(directory)
    assert trained["shards"].keys() == trained["whole"].keys()
    assert {name for name, t in trained["whole"].items() if not torch.equal(t, trained["shards"][name])} == set()
    rows = trained["shards"]["model.embed_tokens.weight"]
    assert rows.shape[0] == VOCAB_SIZE + 2 and not torch.equal(rows[:VOCAB_SIZE], load_rows(base)), "not trained"


def load_rows(folder: Path) -> torch.Tensor:
    """The embedding that a model starts from."""
    files = (load_file(file) for file in folder.glob("*.safetensors"))
    return next(tensors["model.embed_tokens.weight"] for tensors in files if "model.embed_tokens.weight" in tensors)


@pytest.mark.slow
def test_a_process_holds_its_shard_and_no_more(tmp_path: Path) -> None:
    """Widened from bf16, where the old way held the model and a shard; measured beside it."""
    model_gib = 4 * make_folder(tmp_path, 150, "bfloat16") / 2**30
    shards, whole = (measure(tmp_path, way, 2) for way in ("shards", "whole"))
    assert all(one["own"] > model_gib for one in whole), "the old way no longer holds the whole: this compares nothing"
    assert all(0.4 * model_gib < one["own"] < 0.75 * model_gib for one in shards), (shards, model_gib)
    for rank in (0, 1):
        one, other = (json.loads((tmp_path / f"{way}-{rank}.digests").read_text()) for way in ("shards", "whole"))
        assert one == other and any(name.endswith("inv_freq") for name in one)


def test_what_is_not_one_to_one_is_read_whole(base: Path, tmp_path: Path) -> None:
    told: list[str] = []

    def read(folder: Path, precision: str = "fp32") -> bool:
        return is_pending(load_for_shards(folder, precision_policy(precision), SEQ_LEN, told.append))

    assert read(base) and not told
    assert not read(with_a_stranger(base, tmp_path / "stranger")) and "other tensors: stranger.weight" in told[-1]
    config = AutoConfig.for_model("gpt_neox", vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=64,
                                  num_hidden_layers=1, num_attention_heads=4)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "renamed")
    assert not read(tmp_path / "renamed") and "other tensors" in told[-1]
    config = AutoConfig.for_model("mixtral", vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=64,
                                  num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
                                  num_local_experts=2)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "fused")
    assert not read(tmp_path / "fused") and "converts its tensors" in told[-1]
    short = shutil.copytree(base, tmp_path / "short")
    tensors = load_file(short / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    save_file(tensors, short / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match="mismatch"):  # transformers' own words for it
        read(short)
    assert "model.norm.weight has another shape" in told[-1]


def test_a_model_without_weights_has_all_else(base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "model")
    GenerationConfig(temperature=0.3, do_sample=True, eos_token_id=[1, 5]).save_pretrained(folder)
    empty = load_for_shards(folder, precision_policy("bf16"), SEQ_LEN, print)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert all(p.is_meta for p in empty.parameters()) and not empty.training
    shapes = [{name: (p.shape, p.dtype) for name, p in model.named_parameters()} for model in (empty, whole)]
    assert shapes[0] == shapes[1]
    buffers = [dict(model.named_buffers()) for model in (empty, whole)]
    assert len(buffers[0]) and buffers[0].keys() == buffers[1].keys()
    assert all(torch.equal(buffer, buffers[1][name]) for name, buffer in buffers[0].items())
    assert empty.generation_config.to_dict() == whole.generation_config.to_dict()
    assert empty.generation_config.temperature == 0.3
