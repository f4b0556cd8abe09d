"""The example's base model: made by its command, shipped with what the run needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.regulator.__main__ import FOLDER
from data.regulator.pretrain import ROW_TOKENS, batch_loss, lr_factor, make_rows, pack
from data.regulator.world import CODES

BASE = FOLDER / "base"
FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
         "chat_template.jinja"}  # fmt: skip


def test_shipped_base_is_small_and_plain() -> None:
    assert {path.name for path in BASE.iterdir()} == FILES
    assert (BASE / "model.safetensors").stat().st_size <= 8_000_000
    assert AutoModelForCausalLM.from_pretrained(BASE).dtype == torch.float32


def test_codes_and_digits_are_one_token_each() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    assert all(len(tokenizer(code)["input_ids"]) == 1 for code in CODES)
    assert tokenizer.tokenize("87") == ["8", "7"]


def test_template_marks_the_assistants_turn_with_its_end() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    record = json.loads((FOLDER / "reports.jsonl").read_text().splitlines()[0])
    encoded = tokenizer.apply_chat_template(record["messages"], return_dict=True, return_assistant_tokens_mask=True)
    marked = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(marked) == record["messages"][1]["content"] + "<|im_end|>"
    assert tokenizer.eos_token == "<|endoftext|>" and tokenizer.eos_token_id not in encoded["input_ids"]


def test_command_makes_a_base_like_the_shipped_one(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "data.regulator.base",
        "--hardware",
        "cpu",
        "--tokens",
        "8192",
        "--out",
        str(tmp_path),
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert {path.name for path in tmp_path.iterdir()} == FILES
    made, shipped = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path, BASE))
    shapes = [{name: tuple(weight.shape) for name, weight in model.state_dict().items()} for model in (made, shipped)]
    assert shapes[0] == shapes[1]
    assert float(said.split("last loss ")[1].split()[0]) < 7.25  # log(1536) = 7.34 at the start


def test_documents_in_a_row_do_not_see_each_other() -> None:
    model = AutoModelForCausalLM.from_pretrained(BASE)
    ids = torch.arange(100, 160)[None]
    numbers = torch.cat([torch.full((1, 40), 1), torch.full((1, 20), 2)], dim=1)
    packed = batch_loss(model, ids, numbers)
    alone = [batch_loss(model, part, torch.ones_like(part)) for part in (ids[:, :40], ids[:, 40:])]
    torch.testing.assert_close(packed, (39 * alone[0] + 19 * alone[1]) / 58)
    together = batch_loss(model, ids, torch.ones_like(ids))
    assert abs(together - packed) > 1e-3  # the case matters


def test_packing_keeps_every_document_whole() -> None:
    documents = [[number] * length for number, length in enumerate([300, 300, 200, 212, 12, 600], start=1)]
    ids, numbers = pack(documents, pad=0)
    assert ids.shape[1] == ROW_TOKENS and (numbers > 0).sum() == 300 + 300 + 200 + 212 + 12 + ROW_TOKENS
    for number, length in enumerate([300, 300, 200, 212, 12, ROW_TOKENS], start=1):
        rows, _ = np.nonzero(ids == number)
        assert len(rows) == length and len(set(rows)) == 1


def test_rows_are_the_same_for_the_same_seed_and_hold_no_padding_inside() -> None:
    first, second = (make_rows(BASE, 30_000, seed=1) for _ in range(2))
    assert torch.equal(first[0], second[0]) and not torch.equal(first[0], make_rows(BASE, 30_000, seed=2)[0])
    assert (first[1] > 0).float().mean() > 0.9


def test_schedule_warms_up_and_ends_at_its_floor() -> None:
    assert lr_factor(0, 100) == 0.5 and lr_factor(1, 100) == 1.0
    assert abs(lr_factor(99, 100) - 0.1) < 1e-9
