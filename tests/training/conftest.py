"""Tiny models, tokenizers and packed rows, and real worker processes, for the tests of the training worker."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tasks import launch
from tasks.stage import Order, finish, put_order, read_order, write_order
from tasks.training.metrics import METRICS

VOCAB_SIZE, SEQ_LEN = 128, 64
WHAT = {
    "stage": "cpt",
    "seq_len": SEQ_LEN,
    "learning_rate": 1e-3,
    "min_lr_ratio": 0.1,
    "warmup_ratio": 0.2,
    "batch_tokens": 4 * SEQ_LEN,
    "weight_decay": 0.01,
    "adam_betas": [0.9, 0.95],
    "max_grad_norm": 1.0,
    "seed": 0,
    "init": {"sha": "test"},
    "rows": {"key": "test"},
}
HOW = {
    "tag": "cpu",
    "backend": "fsdp",
    "device": "cpu",
    "processes": 1,
    "nodes": 1,
    "precision": "fp32",
    "microbatch_rows": 1,
    "threads": 1,
    "checkpoint": {"every_steps": None, "every_minutes": None, "keep_last": 2},
}


def make_tokenizer(words: int = VOCAB_SIZE - 2) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: `<pad>`, `<eos>`, `w0`, `w1`, ..."""
    vocab = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i + 2 for i in range(words)}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer


def make_model(path: Path, tied: bool = True, vocab_size: int = VOCAB_SIZE, seed: int = 0, **config: Any) -> Path:
    """A folder with a tiny random Llama and its tokenizer."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    kwargs = {**sizes, "num_key_value_heads": 2, "max_position_embeddings": 2 * SEQ_LEN, **config}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=vocab_size, tie_word_embeddings=tied, eos_token_id=1, pad_token_id=0, **kwargs)
    )
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def make_documents(count: int, seed: int = 0, mean: int = 20) -> list[tuple[list[int], list[int], int]]:
    """Documents as (tokens, labels, source); source 1 is chats, of which only the second half is trained."""
    rng = random.Random(seed)
    documents = []
    for number in range(count):
        length = rng.randint(4, 2 * mean)
        start, stride = rng.randrange(2, VOCAB_SIZE), rng.choice((1, 2, 3))
        ids = [2 + (start + stride * i) % (VOCAB_SIZE - 2) for i in range(length - 1)] + [1]
        source = number % 2
        labels = [-100] * (length // 2) + ids[length // 2 :] if source else list(ids)
        documents.append((ids, labels, source))
    return documents


def pack(documents: list[tuple[list[int], list[int], int]]) -> list[dict[str, list[int]]]:
    """Next-fit: documents into rows of at most SEQ_LEN tokens."""
    rows: list[dict[str, list[int]]] = []
    for ids, labels, source in documents:
        if not rows or len(rows[-1]["input_ids"]) + len(ids) > SEQ_LEN:
            rows.append({"input_ids": [], "labels": [], "seq_lengths": [], "seq_sources": []})
        rows[-1]["input_ids"] += ids
        rows[-1]["labels"] += labels
        rows[-1]["seq_lengths"].append(len(ids))
        rows[-1]["seq_sources"].append(source)
    return rows


def crowded_row() -> dict[str, list[int]]:
    """A row of many documents of both sources, where an inner one begins with a label."""
    row = max(pack(make_documents(80, mean=6)), key=lambda row: len(row["seq_lengths"]))
    assert len(row["seq_lengths"]) >= 5 and len(set(row["seq_sources"])) == 2
    return row


def write_rows(path: Path, rows: list[dict[str, list[int]]]) -> Path:
    """An Arrow IPC stream of rows."""
    kinds = {"input_ids": pa.int32(), "labels": pa.int32(), "seq_lengths": pa.int32(), "seq_sources": pa.int16()}
    schema = pa.schema([(name, pa.list_(kind)) for name, kind in kinds.items()])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=schema), max_chunksize=8)
    return path


def make_prepared(
    path: Path,
    rows: list[dict[str, list[int]]],
    tokenizer: Any = None,
    added_tokens: list[str] | None = None,
    end_of_turn: str | None = None,
) -> Path:
    """What the preparation worker leaves behind, as far as training reads it."""
    (path / "tokenizer").mkdir(parents=True)
    put_order(Order("prepare_cpt", "prepare", "test", {}, {}, {}), path)
    write_rows(path / "rows.arrow", rows)
    tokenizer = tokenizer or make_tokenizer()
    tokenizer.save_pretrained(path / "tokenizer")
    turn = {"token": end_of_turn, "id": tokenizer.convert_tokens_to_ids(end_of_turn)} if end_of_turn else None
    counts = {"rows": len(rows), "sources": ["docs", "chats"], "added_tokens": added_tokens or [], "end_of_turn": turn}
    finish(path, ["rows.arrow", "tokenizer"], counts, 0.0)
    return path


def make_stage(runs: Path, init: Path, prepared: Path, how: dict[str, Any] | None = None, **what: Any) -> Path:
    """The directory of a training stage with its order."""
    order = Order("cpt", "train", "test", WHAT | what, HOW | (how or {}), {"init": str(init), "rows": str(prepared)})
    return write_order(order, runs)


def start_worker(directory: Path, processes: int = 1, **environment: str) -> subprocess.Popen[bytes]:
    """A worker as the launcher starts it, in its own process group, its output in worker.log."""
    how = {"processes": processes, "meeting": tempfile.mkdtemp(dir=directory.parent)}
    command = [*launch.python_command("tasks.training", how), str(directory)]
    env = launch.worker_environment(how, (), hub=False) | {"OMP_NUM_THREADS": "1"} | environment
    with (directory / "worker.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)


def finish_worker(worker: subprocess.Popen[bytes], timeout_seconds: float = 240) -> int:
    """Wait for a worker; kill its group when it takes too long."""
    try:
        return worker.wait(timeout_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(worker.pid, signal.SIGKILL)
        raise


def run_worker(directory: Path, processes: int = 1, **environment: str) -> int:
    """Run a worker to its end."""
    return finish_worker(start_worker(directory, processes, **environment))


def wait_until(condition: Callable[[], bool], worker: subprocess.Popen[bytes], seconds: float = 240) -> None:
    """Poll every millisecond until something is true of a running worker."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert worker.poll() is None, f"the worker ended with {worker.returncode} first"
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.001)


def num_lines(directory: Path) -> int:
    """Steps in a stage's metrics so far."""
    path = directory / METRICS
    return path.read_bytes().count(b"\n") if path.is_file() else 0


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base model with tied embeddings."""
    return make_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """42 packed rows of two sources: 11 steps of 4 rows, the last one of 2."""
    rows = pack(make_documents(120))[:42]
    return make_prepared(tmp_path_factory.mktemp("prepared") / "prepare_cpt-test", rows)


def train_here(directory: Path) -> dict[str, Any]:
    """Train a stage in this process; the counts of its artifact, which is not written."""
    from tasks.training import fsdp
    from tasks.training.run import train

    order = read_order(directory)
    threads = torch.get_num_threads()
    try:
        fsdp.start_process(order.how)
        return train(directory, order, fsdp)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """The exported tensors of a stage."""
    return load_file(directory / "model" / "model.safetensors")


def largest_difference(one: Path, other: Path) -> float:
    """Between the exported weights of two stages."""
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
