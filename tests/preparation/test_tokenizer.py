"""The run's tokenizer is what transformers loads, and the one saved is the one used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from tasks.preparation.tokenizer import copy_tokenizer, settle
from tests.preparation.conftest import Stage, make_tokenizer, source, write_lines
from tests.preparation.test_chats import pieces_of

TEXT = "the bank's ratio is 1234.5 and\n\n  the report isn't open"
WHAT = {"vocab_size": 400, "max_positions": 4096, "seq_len": 256, "chat_template": None}


@pytest.mark.parametrize(
    "tokenizer_class", ["PreTrainedTokenizerFast", "TokenizersBackend", "Qwen2Tokenizer", "LlamaTokenizer"]
)
def test_ids_are_those_of_the_model_folder_and_of_the_saved_one(
    stage: Stage, tmp_path: Path, tokenizer_class: str
) -> None:
    model = tmp_path / "model"
    make_tokenizer(model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": tokenizer_class}))
    (model / "config.json").write_text('{"model_type": "llama"}')
    wanted = AutoTokenizer.from_pretrained(model)
    ids = wanted(TEXT)["input_ids"]
    raw = Tokenizer.from_file(str(model / "tokenizer.json")).encode(TEXT).ids
    if tokenizer_class == "LlamaTokenizer":
        assert ids != raw  # the class, not the file, says how text is split
    directory = stage(
        {"a": source(write_lines(tmp_path / "a.jsonl", [{"text": TEXT}]))}, model=model, vocab_size=len(wanted)
    )
    [(found, _)] = pieces_of(directory)
    assert found == [*ids, wanted.eos_token_id]
    assert AutoTokenizer.from_pretrained(directory / "tokenizer")(TEXT)["input_ids"] == ids


def test_special_tokens_of_a_template_are_the_declared_ones_and_those_in_pipes(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "model")
    copy_tokenizer(str(tmp_path / "model"), tmp_path / "out")
    template = ("{#- special_tokens: [USER] [DONE] -#}{# not <|this|> #}{% for m in messages %}"
                "[USER]{{ m['content'] }}[DONE]<|turn|>{{ eos_token }}{% endfor %}")  # fmt: skip
    (tmp_path / "t.jinja").write_text(template)
    settled = settle(tmp_path / "out", {**WHAT, "chat_template": {"path": str(tmp_path / "t.jinja")}}, has_chats=True)
    assert [token for token, _ in settled.added_tokens] == ["[USER]", "[DONE]", "<|turn|>"]
    backend = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert [backend.token_to_id(token) for token, _ in settled.added_tokens] == [i for _, i in settled.added_tokens]
    original = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    assert backend.get_vocab_size() == original.get_vocab_size() + 3
    again = settle(tmp_path / "out", {**WHAT, "chat_template": {"path": str(tmp_path / "t.jinja")}}, has_chats=True)
    assert again.added_tokens == ()


def test_the_template_of_the_order_wins_over_the_tokenizers_own(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("own")
    (tmp_path / "t.jinja").write_text("given")
    copy_tokenizer(str(tmp_path / "model"), tmp_path / "out")
    assert settle(tmp_path / "out", WHAT, has_chats=True).template == "own"
    given = {**WHAT, "chat_template": {"path": str(tmp_path / "t.jinja")}}
    assert settle(tmp_path / "out", given, has_chats=True).template == "given"
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "given"


def test_a_length_limit_in_the_tokenizers_file_cuts_nothing(stage: Stage, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "model")
    backend = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    backend.enable_truncation(5)
    backend.enable_padding(length=300)
    backend.save(str(tmp_path / "model" / "tokenizer.json"))
    directory = stage({"a": source(write_lines(tmp_path / "a.jsonl", [{"text": TEXT}]))}, model=tmp_path / "model")
    [(found, _)] = pieces_of(directory)
    assert Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json")).decode(found[:-1]) == TEXT


def test_the_worker_imports_neither_torch_nor_prefect() -> None:
    """Torch takes seconds, and every process of the pool would pay them."""
    code = ("import sys, tasks.preparation.__main__, transformers.utils.chat_template_utils; "
            "print([name for name in ('torch', 'prefect', 'datasets') if name in sys.modules])")  # fmt: skip
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
