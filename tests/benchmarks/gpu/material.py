"""What the GPU benchmarks train: models of real shapes with random weights, and packed rows of generated text."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen3Config

from tasks.stage import Order, finish, put_order

BASE = Path("data/regulator/base")
TEXTS = {name: Path(f"data/regulator/{name}.jsonl") for name in ("general", "regulations")}
SEQ_LEN, MEAN_DOCUMENT = 4096, 600

COMMON: dict[str, Any] = {
    "max_position_embeddings": 131_072,
    "rope_theta": 500_000.0,
    "rms_norm_eps": 1e-5,
    "use_cache": False,
}
LLAMA_8B = LlamaConfig(vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
                       num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False, **COMMON)  # fmt: skip
LLAMA_1B = LlamaConfig(vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                       num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True, **COMMON)  # fmt: skip
QWEN3_06B = Qwen3Config(vocab_size=151_936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, head_dim=128,
                        num_attention_heads=16, num_key_value_heads=8, tie_word_embeddings=True, **COMMON)  # fmt: skip
LLAMA_100M = LlamaConfig(vocab_size=1536, hidden_size=768, intermediate_size=3072, num_hidden_layers=10,
                         num_attention_heads=12, num_key_value_heads=4, tie_word_embeddings=True, **COMMON)  # fmt: skip
FLOAT32 = ("llama-100m",)  # of the comparisons that look at the last digits
SHAPES = {"llama-8b": LLAMA_8B, "llama-1b": LLAMA_1B, "qwen3-0.6b": QWEN3_06B, "llama-100m": LLAMA_100M}


def make_model(folder: Path, shape: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A model folder with random weights, once; the example's tokenizer, whose ids every vocabulary here holds."""
    if not (folder / "done").exists():
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = AutoModelForCausalLM.from_config(SHAPES[shape], dtype=torch.float32 if shape in FLOAT32 else dtype)
        model.save_pretrained(folder, max_shard_size="4GB")
        for file in BASE.glob("*token*"):
            shutil.copy(file, folder)
        (folder / "done").touch()
    return folder


def make_prepared(
    folder: Path, num_rows: int, seq_len: int = SEQ_LEN, mean: int = MEAN_DOCUMENT, text: str = "general", seed: int = 0
) -> Path:
    """Packed rows as the preparation leaves them, documents of log-normal length cut from the generated text.

    Another seed starts elsewhere in the text; what is held out comes from its last tenth.
    """
    if (folder / "artifact.json").exists():
        return folder
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    texts = (json.loads(line)["text"] for line in TEXTS[text].read_text().splitlines())
    stream = np.concatenate([tokenizer(text)["input_ids"] for text in texts])
    border = len(stream) * 9 // 10
    stream = stream[border:] if seed else stream[:border]
    rng, at, rows = np.random.default_rng(seed), 0, []
    for _ in range(num_rows):
        lengths: list[int] = []
        while sum(lengths) < seq_len:
            drawn = int(rng.lognormal(np.log(mean) - 0.32, 0.8))
            lengths.append(max(8, min(drawn, seq_len)))
        lengths[-1] -= sum(lengths) - seq_len
        ids = [int(token) for token in np.take(stream, np.arange(at, at + seq_len), mode="wrap")]
        at += seq_len
        rows.append({"input_ids": ids, "labels": ids, "seq_lengths": lengths, "seq_sources": [0] * len(lengths)})
    put_order(Order("prepare_cpt", "prepare", "benchmark", {}, {}, {}), folder)
    kinds = {"input_ids": pa.int32(), "labels": pa.int32(), "seq_lengths": pa.int32(), "seq_sources": pa.int16()}
    schema = pa.schema([(name, pa.list_(kind)) for name, kind in kinds.items()])
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=schema), max_chunksize=8)
    tokenizer.save_pretrained(folder / "tokenizer")
    counts = {"rows": num_rows, "sources": ["text"], "added_tokens": [], "end_of_turn": None}
    finish(folder, ["rows.arrow", "tokenizer"], counts, 0.0)
    return folder


def mean_context(prepared: Path) -> float:
    """Positions that a token sees on average, itself included: half of its document."""
    import datasets

    lengths = np.concatenate(
        [np.array(x) for x in datasets.Dataset.from_file(str(prepared / "rows.arrow"))["seq_lengths"]]
    )
    return float((lengths.astype(float) ** 2).sum() / lengths.sum() / 2)


if __name__ == "__main__":
    make_model(Path(sys.argv[1]), sys.argv[2])
