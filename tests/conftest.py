"""Shared fixtures: small configs in a folder of their own, and tiny models of real architectures. Nothing is downloaded."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.local_hub import Hub

# One thread a process: the tests' processes share two cores, and equal thread counts give equal bits.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell starts what it puts in the background with SIGINT ignored, and every process of ours would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).resolve().parent.parent

CONFIG = """\
name: tiny
hardware: cpu
seed: 0
runs_dir: {folder}/runs
model: {{path: {folder}/base, seq_len: 64}}
sources:
  laws:    {{files: "{folder}/laws*.jsonl", text: text}}
  general: {{files: {folder}/general.jsonl, text: text}}
  chats:   {{files: {folder}/chats.jsonl, prompt: prompt, completion: completion}}
cpt:
  tokens: 4096
  mix:    {{laws: 1.0}}
  replay: {{general: 0.25}}
  learning_rate: 1.0e-3
  batch_tokens: 512
sft:
  epochs: 1
  mix:    {{chats: 1.0}}
  learning_rate: 1.0e-3
  batch_tokens: 512
evaluate:
  domain:  [tiny_bpb]
  general: []
  include_path: {folder}/lm_eval
"""
TASK = """\
task: tiny_bpb
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/heldout.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
metadata: {{version: 1.0}}
"""
CHATML = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '<|im_start|>assistant\\n' -}}{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}{{- '\\n' -}}
{%- else -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def write_lines(path: Path, records: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def laws(count: int, first: int = 0) -> list[dict[str, object]]:
    return [{"text": f"Article {n}. A bank keeps ratio {n % 17} at or above {n * 7 % 90 + 10} percent of its own funds."}
            for n in range(first, first + count)]  # fmt: skip


def make_model(folder: Path, texts: list[str], architecture: str = "llama", chat_template: str | None = CHATML) -> Path:
    """A randomly initialised model of a real architecture, with a BPE tokenizer of its own trained on `texts`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|pad|>"] + (["<|im_start|>", "<|im_end|>"] if chat_template else [])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", pad_token="<|pad|>")
    tokenizer.chat_template = chat_template
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        architecture, vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=128, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, made once a session."""
    texts = [str(law["text"]) for law in laws(200)] + ["The river of the town is wide.", "user assistant Which ratio?"]
    return make_model(tmp_path_factory.mktemp("tiny") / "base", texts)


@pytest.fixture
def project(tmp_path: Path, tiny_base: Path) -> Path:
    """A folder with a config, data, lm-eval task and model: all that a run needs. `project / "run.yaml"` is the config."""
    write_lines(tmp_path / "laws.jsonl", laws(200))
    write_lines(tmp_path / "heldout.jsonl", laws(5, first=900))
    write_lines(
        tmp_path / "general.jsonl", [{"text": f"The river of town {n} is {n * 3} miles long."} for n in range(120)]
    )
    chats = [
        {"prompt": f"Which percent for ratio {n}?", "completion": f"{n * 7 % 90 + 10} percent."} for n in range(60)
    ]
    write_lines(tmp_path / "chats.jsonl", chats)
    (tmp_path / "lm_eval").mkdir()
    (tmp_path / "lm_eval" / "tiny_bpb.yaml").write_text(TASK.format(folder=tmp_path))
    shutil.copytree(tiny_base, tmp_path / "base")
    (tmp_path / "run.yaml").write_text(CONFIG.format(folder=tmp_path))
    return tmp_path


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub of our own on loopback."""
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def set_activation(config: Path, name: str) -> None:
    """Change a model's `hidden_act`; one that transformers does not know makes it raise a KeyError in the worker."""
    description = json.loads(config.read_text())
    assert "hidden_act" in description
    config.write_text(json.dumps(description | {"hidden_act": name}))


def edit(project: Path, before: str, after: str) -> Path:
    """Change the project's config; the text to change must stand there exactly once."""
    path = project / "run.yaml"
    text = path.read_text()
    assert text.count(before) == 1, f"{before!r} stands {text.count(before)} times in the config"
    path.write_text(text.replace(before, after))
    return path
