"""The example's base model: `python -m data.regulator.base [--hardware TAG] [--tokens N] [--out FOLDER]`.

A Llama of 1.4 million parameters is drawn at random, reads N tokens of general text and exercises through this project's
own preparation and training (one long `cpt` from random weights), and is copied to `data/regulator/base/`. It never sees a
sentence of the regulations, and no held-out document. The model that ships read 150 million tokens on one H200; a CPU
makes a short one:

    python -m data.regulator.base --hardware 1xh200
    python -m data.regulator.base --hardware cpu --tokens 200000 --out runs/small-base
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
from pathlib import Path

from data.regulator import general
from data.regulator.__main__ import FOLDER, content, held_out_records
from data.regulator.exercises import KINDS as EXERCISES
from data.regulator.exercises import exercise
from data.regulator.tokenizer import END_OF_TEXT, MAX_POSITIONS, PAD, TURN_END, train_tokenizer
from tasks.config import load_config, load_hardware
from tasks.execute import compute
from tasks.plan import make_plan
from tasks.progress import MARK

TOKENS = 150_000_000
SEED = 3
TOKENS_PER_DOCUMENT, DOCUMENTS_PER_FILE = 50, 20_000  # fewer tokens than a document really has: too many rather than too few
EXERCISE_SHARE = 0.32  # of the documents
MODEL = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=4)
TOKENIZER_ROUNDS = 3000  # every kind of document once a round, lists of codes and words more often: each gets its token
SHIPPED = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
           "chat_template.jinja")  # fmt: skip

RECIPE = """\
name: regulator-base
hardware: {hardware}
runs_dir: {work}/stages
model: {{path: {work}/init, seq_len: 512}}
sources:
  general: {{files: "{work}/text/*.jsonl", text: text}}
cpt:
  tokens: {tokens}
  mix: {{general: 1.0}}
  learning_rate: 2.0e-3
  warmup_ratio: 0.02
  weight_decay: 0.05
  batch_tokens: 32768
"""


def main() -> None:
    """Text, tokenizer and random weights; rows; training; the folder that ships."""
    asked = arguments()
    asked.work.mkdir(parents=True, exist_ok=True)
    write_text(asked.work / "text", asked.tokens)
    write_init(asked.work / "init")
    recipe = asked.work / "base.yaml"
    recipe.write_text(RECIPE.format(work=asked.work, tokens=asked.tokens, hardware=asked.hardware))
    plan = make_plan(load_config(recipe), recipe, asked.hardware, load_hardware(asked.hardware))
    compute([plan["prepare_cpt"]], "tasks.preparation", say)
    compute([plan["cpt"]], "tasks.training", say)
    ship(plan["cpt"].directory / "model", asked.out)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the example's base model on general text.")
    parser.add_argument("--hardware", default="cpu", metavar="TAG", help="a row of configs/hardware.yaml")
    parser.add_argument("--tokens", type=int, default=TOKENS, metavar="N", help=f"default: {TOKENS:,}")
    parser.add_argument("--out", type=Path, default=FOLDER / "base", metavar="FOLDER")
    parser.add_argument("--work", type=Path, default=Path("runs/regulator-base"), metavar="FOLDER")
    return parser.parse_args()


def write_text(folder: Path, num_tokens: int) -> None:
    """General text and exercises for `num_tokens`, in files of equal size, written by all cores."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    left, jobs = max(1000, num_tokens // TOKENS_PER_DOCUMENT), []
    while left > 0:
        jobs.append((folder, len(jobs), min(left, DOCUMENTS_PER_FILE)))
        left -= DOCUMENTS_PER_FILE
    with multiprocessing.get_context("spawn").Pool(min(len(jobs), os.cpu_count() or 1)) as pool:
        pool.starmap(write_file, jobs)


def write_file(folder: Path, number: int, num_documents: int) -> None:
    """One file of text; nothing of it is held out."""
    held_out = {content(record) for record in held_out_records()["eval/general"]}
    rng = random.Random(f"base {SEED} {number}")
    with (folder / f"{number:04d}.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(num_documents):
            text = exercise(rng) if rng.random() < EXERCISE_SHARE else general.document(rng)
            if text not in held_out:
                file.write(json.dumps({"text": text}) + "\n")


def write_init(folder: Path) -> None:
    """A folder with the tokenizer and random weights."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    rng = random.Random(f"tokenizer {SEED}")
    spelling, copying = EXERCISES[:2]
    kinds = [*general.KINDS, *EXERCISES, spelling, spelling, *[copying] * 5]
    tokenizer = train_tokenizer(kind(rng) for _ in range(TOKENIZER_ROUNDS) for kind in kinds)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in (PAD, END_OF_TEXT, TURN_END)}
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(
        LlamaConfig(
            **MODEL, vocab_size=len(tokenizer), max_position_embeddings=MAX_POSITIONS, tie_word_embeddings=True,
            rms_norm_eps=1e-5, bos_token_id=None, eos_token_id=ids[END_OF_TEXT], pad_token_id=ids[PAD],
        )
    )  # fmt: skip
    model.generation_config = GenerationConfig(eos_token_id=[ids[END_OF_TEXT], ids[TURN_END]], pad_token_id=ids[PAD])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def ship(model: Path, out: Path) -> None:
    """Copy what a base model consists of."""
    out.mkdir(parents=True, exist_ok=True)
    for name in SHIPPED:
        shutil.copyfile(model / name, out / name)
    say(f"base          written to {out}: {(out / 'model.safetensors').stat().st_size / 1e6:.1f} MB of weights")


def say(text: str) -> None:
    """A line for the person who waits."""
    print(text.removeprefix(MARK), flush=True)


if __name__ == "__main__":
    main()
