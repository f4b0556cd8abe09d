"""The example's base model: `python -m data.regulator.base [--hardware TAG] [--tokens N] [--out FOLDER]`.

Learns a tokenizer from general text and exercises, draws a Llama of 1.5 million parameters at random, trains it
on N tokens of the same kind of text and writes it to `data/regulator/base/`. It never sees a sentence of the
regulations, nor a held-out document. The first command is the recipe of the model that ships, which an earlier form
of this loop ran on one H200 (173 million tokens, 4 minutes); the second makes a small one on any CPU:

    python -m data.regulator.base --hardware 1xh200
    python -m data.regulator.base --hardware cpu --tokens 20000 --out runs/small-base
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data.regulator import general
from data.regulator.__main__ import FOLDER
from data.regulator.exercises import KINDS as EXERCISES
from data.regulator.pretrain import make_rows, pretrain
from data.regulator.tokenizer import END_OF_TEXT, MAX_POSITIONS, PAD, TURN_END, train_tokenizer
from tasks.machine import resolve_tag
from tasks.progress import say

TOKENS = 173_000_000
SEED = 3
GPU_BATCH_ROWS, CPU_BATCH_ROWS = 64, 8
# Every kind of text once a round; lists of codes and words more often, so that each becomes one token.
TOKENIZER_ROUNDS = 1500
SHAPE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6, "num_attention_heads": 4,
         "num_key_value_heads": 4}  # fmt: skip


def main() -> None:
    """Tokenizer and random weights, rows, training, the folder that ships."""
    asked = arguments()
    device = resolve_tag(asked.hardware)[1].device
    say("base          learning the tokenizer")
    tokenizer = make_tokenizer()
    asked.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(asked.out)
    make_random_model(tokenizer).save_pretrained(asked.out)
    say("base          writing text and packing it")
    rows = make_rows(asked.out, asked.tokens, SEED)
    batch_rows = GPU_BATCH_ROWS if device == "cuda" else CPU_BATCH_ROWS
    model = pretrain(asked.out, rows, asked.tokens, batch_rows, device, say)
    model.cpu().save_pretrained(asked.out)
    size = (asked.out / "model.safetensors").stat().st_size
    say(f"base          {model.num_parameters():,} parameters, {size / 1e6:.1f} MB, in {asked.out}")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the example's base model on general text.")
    parser.add_argument("--hardware", default="cpu", metavar="TAG", help="a row of configs/hardware.yaml")
    parser.add_argument("--tokens", type=int, default=TOKENS, metavar="N", help=f"default: {TOKENS:,}")
    parser.add_argument("--out", type=Path, default=FOLDER / "base", metavar="FOLDER")
    return parser.parse_args()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, learned from general text and exercises alone; the same on every machine."""
    rng = random.Random(SEED)
    spelling, copying = EXERCISES[:2]
    kinds = [*general.KINDS, *EXERCISES, *[spelling] * 2, *[copying] * 5]
    return train_tokenizer(kind(rng) for _ in range(TOKENIZER_ROUNDS) for kind in kinds)


def make_random_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with random weights for the tokenizer. Generation ends at the end of a turn, too."""
    ids = tokenizer.get_vocab()
    pad, end_of_text, turn_end = ids[PAD], ids[END_OF_TEXT], ids[TURN_END]
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(
        LlamaConfig(
            **SHAPE, vocab_size=len(tokenizer), max_position_embeddings=MAX_POSITIONS, tie_word_embeddings=True,
            rms_norm_eps=1e-5, bos_token_id=None, eos_token_id=end_of_text, pad_token_id=pad,
        )
    )  # fmt: skip
    model.generation_config = GenerationConfig(eos_token_id=[end_of_text, turn_end], pad_token_id=pad)
    return model


if __name__ == "__main__":
    main()
