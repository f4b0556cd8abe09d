"""The model to start from: what is refused, how it is loaded, which rows new tokens get."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tasks.disk import free_bytes
from tasks.errors import UserError
from tasks.stage import read_order
from tasks.training.model import (
    add_token_rows,
    check_init,
    is_rounded,
    load_model,
    load_tokenizer,
    resolve_init,
    tensor_shapes,
)
from tasks.training.precision import precision_policy
from tests.training.conftest import SEQ_LEN, VOCAB_SIZE, make_model, make_stage, make_tokenizer

NEW_TOKENS = ["<|turn|>", "<|end|>"]


def tokenizer_folder(path: Path, added: list[str] | None = None, words: int = VOCAB_SIZE - 2) -> Path:
    tokenizer = make_tokenizer(words)
    tokenizer.add_special_tokens({"additional_special_tokens": added or []})
    tokenizer.save_pretrained(path)
    return path


def test_pickled_weights_are_refused_and_not_loaded(base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights"):
        check_init(folder, SEQ_LEN, tmp_path, keep_last=2)
    (folder / "pytest_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match=r"pickled weights only \(pytest_model.bin\)"):
        check_init(folder, SEQ_LEN, tmp_path, keep_last=2)


def test_seq_len_beyond_the_positions_is_refused(base: Path, tmp_path: Path) -> None:
    check_init(base, 2 * SEQ_LEN, tmp_path, keep_last=2)
    with pytest.raises(UserError, match="seq_len is 129, but the model has 128 positions"):
        check_init(base, 2 * SEQ_LEN + 1, tmp_path, keep_last=2)


def test_a_disk_too_small_for_the_checkpoints_is_refused(base: Path, tmp_path: Path) -> None:
    num_parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(base).parameters())
    fitting = free_bytes(tmp_path) // (12 * num_parameters)  # checkpoints of weights and two moments in float32
    check_init(base, SEQ_LEN, tmp_path, keep_last=fitting // 2)
    with pytest.raises(UserError, match="disk is too small for the checkpoints"):
        check_init(base, SEQ_LEN, tmp_path, keep_last=2 * fitting)
    (tmp_path / "checkpoints").mkdir()
    with (tmp_path / "checkpoints" / "sparse").open("wb") as file:
        file.truncate(12 * num_parameters * 2 * fitting)
    check_init(base, SEQ_LEN, tmp_path, keep_last=2 * fitting)  # what this run wrote before is already paid for


def test_rounding_a_float32_hand_over_is_noticed(base: Path, tmp_path: Path) -> None:
    halved = tmp_path / "bf16"
    load_model(base, precision_policy("bf16"), SEQ_LEN).save_pretrained(halved)
    told = {(folder.name, name): is_rounded(folder, precision_policy(name))
            for folder in (base, halved) for name in ("fp32-master", "bf16")}  # fmt: skip
    assert [case for case, rounded in told.items() if rounded] == [(base.name, "bf16")]


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    order = read_order(make_stage(tmp_path, tmp_path / "nowhere", tmp_path))
    with pytest.raises(UserError, match="no model folder"):
        resolve_init(order)


def test_a_tokenizer_of_another_vocabulary_is_refused(base: Path, tmp_path: Path) -> None:
    load_tokenizer(tokenizer_folder(tmp_path / "same"), base, [])
    with pytest.raises(UserError, match="different vocabulary") as error:
        load_tokenizer(tokenizer_folder(tmp_path / "larger", words=VOCAB_SIZE), base, [])
    assert str(VOCAB_SIZE) in error.value.what
    # Tokens beyond the embedding are fine exactly where preparation said that it added them.
    folder = tokenizer_folder(tmp_path / "added", NEW_TOKENS)
    with pytest.raises(UserError, match="different vocabulary"):
        load_tokenizer(folder, base, [])
    assert load_tokenizer(folder, base, NEW_TOKENS)[1] == NEW_TOKENS


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_get_the_mean_row_in_both_embeddings(tied: bool, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", tied=tied)
    model = load_model(folder, precision_policy("fp32"), SEQ_LEN)
    tokenizer, new = load_tokenizer(tokenizer_folder(tmp_path / "tokenizer", NEW_TOKENS), folder, NEW_TOKENS)
    before = load_file(folder / "model.safetensors")
    assert ("lm_head.weight" in before) != tied
    assert add_token_rows(model, tokenizer, new) == 2
    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (inputs is outputs) == tied
    names = {"model.embed_tokens.weight": inputs} | ({} if tied else {"lm_head.weight": outputs})
    for name, weight in names.items():
        assert weight.shape[0] == VOCAB_SIZE + 2 == model.config.vocab_size
        assert torch.equal(weight[:VOCAB_SIZE], before[name])
        torch.testing.assert_close(weight[VOCAB_SIZE:], before[name].mean(0).expand(2, -1))


def test_a_padded_vocabulary_keeps_its_size_and_the_new_rows_are_set(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", vocab_size=VOCAB_SIZE + 16)
    model = load_model(folder, precision_policy("fp32"), SEQ_LEN)
    tokenizer, new = load_tokenizer(tokenizer_folder(tmp_path / "tokenizer", NEW_TOKENS), folder, NEW_TOKENS)
    before = model.get_input_embeddings().weight.detach().clone()
    assert add_token_rows(model, tokenizer, new) == 2
    after = model.get_input_embeddings().weight
    assert after.shape[0] == VOCAB_SIZE + 16
    torch.testing.assert_close(after[VOCAB_SIZE : VOCAB_SIZE + 2], before[:VOCAB_SIZE].mean(0).expand(2, -1))
    assert torch.equal(after[VOCAB_SIZE + 2 :], before[VOCAB_SIZE + 2 :])


def test_tokens_that_an_earlier_stage_trained_keep_their_rows(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "cpt_model", vocab_size=VOCAB_SIZE + 2)
    tokenizer_folder(folder, NEW_TOKENS)
    tokenizer, new = load_tokenizer(tokenizer_folder(tmp_path / "tokenizer", NEW_TOKENS), folder, NEW_TOKENS)
    assert new == []
    assert add_token_rows(load_model(folder, precision_policy("fp32"), SEQ_LEN), tokenizer, new) == 0


def test_float32_is_handed_over_and_bf16_is_widened(base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    config = (folder / "config.json").read_text()
    assert '"dtype": "float32"' in config
    (folder / "config.json").write_text(config.replace('"dtype": "float32"', '"dtype": "bfloat16"'))
    loaded = dict(load_model(folder, precision_policy("fp32"), SEQ_LEN).named_parameters())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items()), "cut short on the way"
    save_file({n: t.bfloat16() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    widened = load_model(folder, precision_policy("fp32-master"), SEQ_LEN)
    assert {p.dtype for p in widened.parameters()} == {torch.float32}
    assert len(tensor_shapes(folder)) == len(tensors)


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(UserError, match="unknown precision 'fp16'"):
        precision_policy("fp16")
