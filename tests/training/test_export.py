"""The export as a stream: files of a limited size, the architecture's own names, little memory."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tasks.errors import UserError
from tasks.stage import finish
from tasks.tables import training_facts
from tasks.training import export
from tasks.training.deploy import copy_model
from tasks.training.export import export_model, moved_share, write_weights
from tasks.training.run import OUTPUTS
from tests.training.conftest import (
    VOCAB_SIZE,
    make_documents,
    make_model,
    make_prepared,
    make_stage,
    make_tokenizer,
    pack,
    train_here,
)


def parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, parameter.detach()) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_a_large_model_is_written_in_several_files_with_an_index(tmp_path: Path, tied: bool) -> None:
    before = make_model(tmp_path / "before", tied=tied)
    model = AutoModelForCausalLM.from_pretrained(before)
    folder = export_model(tmp_path, model, make_tokenizer(), parameters(model), [1], file_bytes=30_000)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 35_000 for file in files)
    assert [file.name for file in files] == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in
                                             range(1, len(files) + 1)]  # fmt: skip
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(loaded.parameters(), model.parameters(), strict=True))
    assert moved_share(before, folder) == 0


def test_what_was_trained_in_bf16_says_so_and_rounding_on_loading_is_no_move(tmp_path: Path) -> None:
    before = make_model(tmp_path / "before")  # float32
    model = AutoModelForCausalLM.from_pretrained(before, dtype=torch.bfloat16)
    folder = export_model(tmp_path, model, make_tokenizer(), parameters(model), [1])
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert moved_share(before, folder) == 0


SAMPLED = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 1}
GENERATION = {  # what a base says -> what its export says, and what is told
    "sampling values alone": (SAMPLED, SAMPLED | {"do_sample": True}, "in the export do_sample is true\n"),
    "sampling values of a greedy model": (
        SAMPLED | {"do_sample": False}, {"eos_token_id": 1, "do_sample": False},
        "in the export temperature is gone, it was 0.9; top_p is gone, it was 0.6\n",
    ),
    "no token for padding": ({"pad_token_id": -1, "eos_token_id": 1}, {"eos_token_id": 1}, "pad_token_id is gone, it was -1\n"),
    "beams": ({"early_stopping": True, "num_beams": 1}, {"num_beams": 1}, "early_stopping is gone, it was True\n"),
    "all of it": ({"do_sample": True, "top_k": 5}, {"do_sample": True, "top_k": 5}, ""),
}  # fmt: skip


@pytest.mark.parametrize("case", GENERATION)
def test_a_training_from_an_invalid_generation_config_is_exported(
    base: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said, exported, told = GENERATION[case]
    init = Path(shutil.copytree(base, tmp_path / "init"))
    (init / "generation_config.json").write_text(json.dumps(said))
    prepared = make_prepared(tmp_path / "prepared", pack(make_documents(8)))
    directory = make_stage(tmp_path, init, prepared)
    train_here(directory)
    found = json.loads((directory / "model/generation_config.json").read_text())
    assert {name: found.get(name) for name in exported} == exported
    assert not (said.keys() - exported.keys()) & found.keys() - {"pad_token_id"} and found.get("pad_token_id") != -1
    out = capsys.readouterr().out
    assert told in out and ("generation_config" in out) == bool(told)
    GenerationConfig.from_pretrained(directory / "model").validate(strict=True)


def test_fused_experts_are_exported_under_the_names_of_their_architecture(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=11, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, eos_token_id=1,
    ))  # fmt: skip
    model.save_pretrained(tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    assert any(name not in theirs for name, _ in model.named_parameters()), "nothing is fused in this architecture"
    folder = export_model(tmp_path, model, make_tokenizer(), parameters(model), [1])
    ours = load_file(folder / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_weights_move_that_the_base_names_without_the_models_prefix(tmp_path: Path) -> None:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": VOCAB_SIZE}
    GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=1, bos_token_id=1)).save_pretrained(tmp_path / "init")
    make_tokenizer().save_pretrained(tmp_path / "init")
    file = tmp_path / "init/model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    prepared = make_prepared(tmp_path / "prepared", pack(make_documents(8)))
    directory = make_stage(tmp_path, tmp_path / "init", prepared)
    assert 0.8 < train_here(directory)["weights_moved_share"] <= 1
    assert not tensors.keys() & load_file(directory / "model/model.safetensors").keys()
    assert moved_share(tmp_path / "init", directory / "model") is None


def test_of_weights_that_cannot_be_compared_nothing_is_said(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "moved_share", lambda *_: None)
    directory = make_stage(tmp_path, base, make_prepared(tmp_path / "prepared", pack(make_documents(8))))
    counts = train_here(directory)
    finish(directory, OUTPUTS, counts, 1.0)
    assert "weights that moved" not in dict(training_facts(directory)) and counts["weights_moved_share"] is None


def test_no_more_than_a_file_is_in_memory(tmp_path: Path) -> None:
    alive: set[int] = set()
    most = 0

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal most
        for number in range(40):
            tensor = torch.full((250,), float(number))  # 1000 bytes
            alive.add(number)
            weakref.finalize(tensor, alive.discard, number)
            most = max(most, len(alive))
            yield f"t{number}", tensor
            del tensor

    write_weights(tmp_path, stream(), file_bytes=5000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) == 8
    assert 5 <= most <= 7, most


def test_a_copy_for_serving_holds_the_same_model_in_bf16(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "before"))
    folder = export_model(tmp_path, model, make_tokenizer(), parameters(model), [1])
    copy_model(folder, tmp_path / "bf16", file_bytes=30_000)
    copy = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16")
    assert copy.dtype is torch.bfloat16 and len(list((tmp_path / "bf16").glob("*.safetensors"))) > 1
    assert all(torch.equal(ours, theirs.bfloat16()) for ours, theirs in
               zip(copy.parameters(), model.parameters(), strict=True))  # fmt: skip
    assert {file.name for file in folder.iterdir()} <= {file.name for file in (tmp_path / "bf16").iterdir()} | {
        "model.safetensors"
    }
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "bf16").iterdir()} == {0o644}
    with pytest.raises(UserError, match="exists"):
        copy_model(folder, tmp_path / "bf16")
    with pytest.raises(UserError, match="no model folder"):
        copy_model(tmp_path, tmp_path / "nothing")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["before", "bf16", "model"]
