"""Benchmark: the whole preparation against the bare tokenizer, and its memory at one and four times the text.

    python -m tests.benchmarks.preparation [--megabytes 64] [--rounds 3] [--seq-len 4096] [--processes N]

Bare means `tokenizers`' own `encode_batch` of the same texts, in memory, on all cores, and nothing else. Ours is the
worker's command as a user runs it: interpreter start, reading, cleaning, duplicates, tokenizing, mixing, packing,
rows, ledger, digests. Rounds alternate between the two, since other programs may use the machine; the best of each
counts, and CPU time is shown beside it. Text and tokenizer are made by a seed, so everybody measures the same.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tasks.preparation.__main__ import num_cores
from tasks.stage import Order, file_sha256, read_artifact, write_order

TARGET_RATIO, TARGET_GROWTH = 1.3, 1.15
VOCABULARY, NUM_WORDS, MEAN_WORDS = 32_000, 120_000, 350
MEGABYTE = 1_000_000
EOS = "<|endoftext|>"


def main() -> None:
    """Make text and tokenizer, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--processes", type=int, default=num_cores())
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="steep-benchmark-") as folder:
        speed(Path(folder), options)
        memory(Path(folder), options)


def speed(folder: Path, options: argparse.Namespace) -> None:
    """Bare and ours in turn; the ratio of the best rounds."""
    corpus = write_corpus(folder / "corpus.jsonl", options.megabytes)
    train_tokenizer(folder / "model", corpus)
    bare, ours = [], []
    for number in range(options.rounds):
        bare.append(run_bare(folder, corpus))
        ours.append(run_stage(folder, corpus, options, seed=number))
        print(f"round {number + 1}: bare {bare[-1]['wall']:.1f} s, CPU {bare[-1]['cpu']:.1f} s; "
              f"ours {ours[-1]['wall']:.1f} s, CPU {ours[-1]['cpu']:.1f} s", flush=True)  # fmt: skip
    counts = ours[-1]["counts"]
    size = corpus.stat().st_size / MEGABYTE
    print(f"{size:.0f} MB, {counts['tokens']:,} tokens, {counts['rows']:,} rows of {options.seq_len}, "
          f"fill {counts['fill']:.4%}, {options.processes} processes, {num_cores()} cores")  # fmt: skip
    print(f"{'':16}{'wall s':>8}{'MB/s':>8}{'CPU s':>8}    best of {options.rounds} rounds each")
    best = {}
    for name, runs in (("bare tokenizer", bare), ("preparation", ours)):
        best[name] = wall, cpu = min(run["wall"] for run in runs), min(run["cpu"] for run in runs)
        print(f"{name:16}{wall:8.2f}{size / wall:8.1f}{cpu:8.2f}")
    wall, cpu = (mine / theirs for mine, theirs in zip(best["preparation"], best["bare tokenizer"], strict=True))
    print(f"{'ratio':16}{wall:8.2f}{'':8}{cpu:8.2f}    target <= {TARGET_RATIO}")


def memory(folder: Path, options: argparse.Namespace) -> None:
    """Peak memory of all processes together, at a quarter of the text and at all of it."""
    peaks = []
    for part in (4, 1):
        corpus = write_corpus(folder / f"corpus_{part}.jsonl", options.megabytes // part)
        peaks.append(run_stage(folder, corpus, options, seed=100 + part)["peak_mib"])
    print(f"peak memory     {peaks[0]:6.0f} MiB at {options.megabytes // 4} MB, {peaks[1]:.0f} MiB at {options.megabytes} MB, "
          f"ratio {peaks[1] / peaks[0]:.2f}, target <= {TARGET_GROWTH}")  # fmt: skip


def write_corpus(path: Path, megabytes: int, seed: int = 0) -> Path:
    """JSON lines of made-up words with Zipf's frequencies; log-normal lengths, numbers, punctuation, some non-ASCII."""
    rng = np.random.default_rng(seed)
    words = np.array(list(_words(rng)), dtype=object)
    cumulative = np.cumsum(1 / (np.arange(NUM_WORDS) + 2.7))
    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < megabytes * MEGABYTE:
            sizes = rng.lognormal(np.log(MEAN_WORDS), 0.9, 200).astype(int) + 5
            drawn = words[np.searchsorted(cumulative, rng.random(sizes.sum()) * cumulative[-1])]
            for some in np.split(drawn + _marks(rng, len(drawn)), np.cumsum(sizes)[:-1]):
                written += file.write(json.dumps({"text": " ".join(some.tolist())}, ensure_ascii=False) + "\n")
    return path


def _words(rng: np.random.Generator) -> Iterator[str]:
    onsets = [
        "b",
        "br",
        "c",
        "ch",
        "cl",
        "d",
        "dr",
        "f",
        "fl",
        "g",
        "gr",
        "h",
        "j",
        "k",
        "l",
        "m",
        "n",
        "p",
        "pl",
        "pr",
        "qu",
        "r",
        "s",
        "sc",
        "sh",
        "sp",
        "st",
        "str",
        "t",
        "th",
        "tr",
        "v",
        "w",
        "z",
    ]
    vowels = ["a", "ai", "e", "ea", "ee", "i", "ie", "o", "oa", "oo", "ou", "u", "é", "ü"]
    codas = [
        "",
        *[
            "b",
            "ck",
            "d",
            "ft",
            "g",
            "l",
            "ll",
            "lt",
            "m",
            "mp",
            "n",
            "ng",
            "nt",
            "p",
            "r",
            "rd",
            "rk",
            "rm",
            "s",
            "ss",
            "st",
            "t",
            "x",
        ],
    ]
    for number in range(NUM_WORDS):
        num_syllables = 1 + min(4, int(rng.poisson(0.6 + number / NUM_WORDS)))
        word = "".join(rng.choice(onsets) + rng.choice(vowels) + rng.choice(codas) for _ in range(num_syllables))
        yield word.capitalize() if number % 11 == 0 else word


def _marks(rng: np.random.Generator, number: int) -> np.ndarray:
    """What follows each word: nothing, a mark, the end of a line, a number."""
    marks = np.array(["", ".", ",", "\n", " #"], dtype=object)[rng.choice(5, number, p=[0.86, 0.05, 0.05, 0.01, 0.03])]
    numbers = np.flatnonzero(marks == " #")
    marks[numbers] = [f" {value}" for value in rng.integers(0, 30_000, len(numbers)).tolist()]
    return marks


def train_tokenizer(folder: Path, corpus: Path) -> None:
    """A byte-level BPE with the split of current models, trained on the first 6 MB."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[EOS], initial_alphabet=alphabet,
                                  show_progress=False)  # fmt: skip
    with corpus.open(encoding="utf-8") as lines:
        sample = [json.loads(line)["text"] for line in lines.readlines(6 * MEGABYTE)]
    tokenizer.train_from_iterator(sample, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def run_bare(folder: Path, corpus: Path) -> dict[str, Any]:
    """The bare tokenizer on the whole corpus; start-up and reading are not counted."""
    command = [sys.executable, "-m", "tests.benchmarks.bare", str(folder / "model"), str(corpus)]
    wall, cpu = subprocess.check_output(command, text=True).split()
    return {"wall": float(wall), "cpu": float(cpu)}


def run_stage(folder: Path, corpus: Path, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The worker's command on the whole corpus, once through."""
    files = [{"path": str(corpus), "bytes": corpus.stat().st_size, "sha256": file_sha256(corpus)}]
    what = {"stage": "cpt", "tokenizer": {}, "chat_template": None, "seq_len": options.seq_len, "max_positions": None,
            "vocab_size": VOCABULARY, "sources": {"text": {"spec": {"files": str(corpus), "text": "text"}, "files": files}},
            "tokens": None, "epochs": 1.0, "mix": {"text": 1.0}, "replay": {}, "max_epochs": {"mix": 4, "replay": 1},
            "overflow": "error", "seed": seed}  # fmt: skip
    how = {"processes": options.processes}
    directory = write_order(Order("prepare_cpt", "prepare", "b", what, how, {"model": str(folder / "model")}), folder)
    found = measure([sys.executable, "-m", "tasks.preparation", str(directory)])
    return {**found, "counts": read_artifact(directory)["counts"]}


def measure(command: list[str]) -> dict[str, float]:
    """Wall and CPU seconds of a command with its children, and peak MiB of all of them together."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, _resident_bytes(process.pid))
        time.sleep(0.05)
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert process.returncode == 0, f"{command} failed"
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": wall, "cpu": cpu, "peak_mib": peak / 2**20}


def _resident_bytes(pid: int) -> int:
    """Resident memory of a process and its children; what they share is counted for each."""
    try:
        with Path(f"/proc/{pid}/statm").open() as file:
            own = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        with Path(f"/proc/{pid}/task/{pid}/children").open() as file:
            return own + sum(_resident_bytes(int(child)) for child in file.read().split())
    except (FileNotFoundError, ProcessLookupError):
        return 0


if __name__ == "__main__":
    main()
