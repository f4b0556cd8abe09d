"""Fixtures of the preparation's tests: a tiny byte-level BPE tokenizer, sources on disk, and a stage run in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tasks.preparation.__main__ import main
from tasks.stage import ERROR, Order, file_sha256, write_order

EOS = "<|endoftext|>"
CHAT_TEMPLATE = Path("configs/chat_template.jinja")
WORDS = [
    "the",
    "bank",
    "holds",
    "ratio",
    "limit",
    "capital",
    "report",
    "risk",
    "of",
    "and",
    "in",
    "a",
    "loan",
    "value",
    "level",
    "for",
    "asset",
    "open",
    "breach",
]


def make_tokenizer(folder: Path, vocab_size: int = 400, eos: str | None = EOS) -> int:
    """A byte-level BPE tokenizer trained on our words; returns the number of its tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[EOS], initial_alphabet=alphabet,
                                  show_progress=False)  # fmt: skip
    tokenizer.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | ({"eos_token": eos} if eos else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer.get_vocab_size()


def sentence(rng: np.random.Generator, num_words: int) -> str:
    """Some of our words."""
    return " ".join(rng.choice(WORDS, num_words))


def make_documents(path: Path, number: int, seed: int = 0, mean_words: float = 60.0) -> Path:
    """JSON lines of documents of mixed length."""
    rng = np.random.default_rng(seed)
    sizes = rng.lognormal(np.log(mean_words), 0.8, number).astype(int) + 6
    return write_lines(path, [{"text": f"{i} {seed} {sentence(rng, n)}"} for i, n in enumerate(sizes.tolist())])


def make_chats(path: Path, number: int, seed: int = 0) -> Path:
    """JSON lines of chats with one or two exchanges."""
    rng = np.random.default_rng(seed)
    return write_lines(path, [{"messages": _chat(rng, i)} for i in range(number)])


def write_lines(path: Path, records: list[Any]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def _chat(rng: np.random.Generator, number: int) -> list[dict[str, str]]:
    turns = []
    for _ in range(int(rng.integers(1, 3))):
        turns.append({"role": "user", "content": f"{number} {sentence(rng, int(rng.integers(3, 20)))}?"})
        turns.append({"role": "assistant", "content": sentence(rng, int(rng.integers(3, 40)))})
    return turns


def source(paths: Path | list[Path], **spec: Any) -> dict[str, Any]:
    """A source as an order holds it."""
    found = sorted(paths) if isinstance(paths, list) else [paths]
    files = [{"path": str(path), "bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in found]
    return {"spec": {"files": [str(path) for path in found], **(spec or {"text": "text"})}, "files": files}


Stage = Callable[..., Path]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: only its tokenizer matters here."""
    folder = tmp_path_factory.mktemp("model")
    make_tokenizer(folder)
    return folder


@pytest.fixture
def stage(model: Path, tmp_path: Path) -> Stage:
    """Write an order and run the worker in this process; returns its directory. The exit code must be as expected."""

    def run(
        sources: dict[str, Any],
        processes: int = 1,
        exit_code: int = 0,
        model: Path = model,
        runs: str = "runs",
        **what: Any,
    ) -> Path:
        defaults = {
            "stage": "cpt", "tokenizer": {}, "chat_template": {"path": str(CHAT_TEMPLATE), "sha256": file_sha256(CHAT_TEMPLATE)},
            "seq_len": 256, "max_positions": 4096, "vocab_size": 400, "tokens": None, "epochs": None,
            "mix": {name: 1.0 / len(sources) for name in sources}, "replay": {}, "max_epochs": {"mix": 4, "replay": 1},
            "overflow": "error", "seed": 0,
        }  # fmt: skip
        merged = {**defaults, **what, "sources": sources}
        if merged["tokens"] is None and merged["epochs"] is None:
            merged["epochs"] = 1.0
        order = Order("prepare_cpt", "prepare", "test", merged, {"processes": processes}, {"model": str(model)})
        directory = write_order(order, tmp_path / runs)
        assert main(directory) == exit_code, (directory / ERROR).read_text()
        return directory

    return run
