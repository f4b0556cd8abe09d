"""Pretraining of the example's base model: text into rows on all cores, then a plain loop over them on one device.

The project's own stages are made for continuing a model; this one starts from nothing and reads a hundred times
what they read, most of it made on the fly. So it has a loop of its own, without checkpoints: 200 million tokens
take minutes on one GPU. Documents in a row do not see each other, as in the project's trainer.

Letters: N rows, B rows of a batch, T tokens of a row, V vocabulary.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, LlamaForCausalLM

from data.regulator import general
from data.regulator.__main__ import content, held_out_records
from data.regulator.exercises import exercise
from tasks.progress import Progress

ROW_TOKENS = 512
DOCUMENTS_PER_JOB = 4000
MAX_DOCUMENTS = 2_400_000  # 130 million tokens; a longer run reads them again
TOKENS_PER_DOCUMENT = 54
EXERCISE_SHARE = 0.32  # of the documents
OPEN_ROWS = 24
LEARNING_RATE, WARMUP_RATIO, MIN_LR_RATIO = 2e-3, 0.02, 0.1
WEIGHT_DECAY, BETAS, MAX_GRAD_NORM = 0.05, (0.9, 0.95), 1.0


def make_rows(tokenizer_folder: Path, num_tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of general text and exercises in random order: tokens, and the number of each token's document in its row.

    Both are (N, T) int16; document 0 is padding. The same rows for any number of cores.
    """
    num_documents = min(MAX_DOCUMENTS, max(500, num_tokens // TOKENS_PER_DOCUMENT))
    sizes = [min(DOCUMENTS_PER_JOB, num_documents - done) for done in range(0, num_documents, DOCUMENTS_PER_JOB)]
    jobs = [(tokenizer_folder, f"base {seed} {number}", size) for number, size in enumerate(sizes)]
    if len(jobs) == 1:
        parts = [rows_of_job(*jobs[0])]
    else:
        with multiprocessing.get_context("spawn").Pool(min(len(jobs), os.cpu_count() or 1)) as pool:
            parts = pool.starmap(rows_of_job, jobs, chunksize=1)
    order = np.random.default_rng(seed).permutation(sum(len(ids) for ids, _ in parts))
    ids, documents = (torch.from_numpy(np.concatenate(column)[order]) for column in zip(*parts, strict=True))
    return ids, documents


def rows_of_job(tokenizer_folder: Path, seed: str, num_documents: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of one job's documents; none of them is held out."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    held_out = {content(record) for record in held_out_records()["eval/general"]}
    rng = random.Random(seed)
    drawn = (exercise(rng) if rng.random() < EXERCISE_SHARE else general.document(rng) for _ in range(num_documents))
    texts = [text for text in drawn if text not in held_out]
    return pack([[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]], tokenizer.pad_token_id)


def pack(documents: list[list[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents into rows, first fit over a few open rows (98 % filled); a document never spans two rows."""
    rows: list[list[list[int]]] = []
    opened: list[tuple[int, int]] = []  # (free tokens, row)
    for document in documents:
        document = document[:ROW_TOKENS]
        place = next((i for i, (free, _) in enumerate(opened) if free >= len(document)), None)
        if place is None:
            rows.append([])
            opened.append((ROW_TOKENS, len(rows) - 1))
            if len(opened) > OPEN_ROWS:
                opened.remove(min(opened))  # the fullest
            place = len(opened) - 1
        free, row = opened[place]
        opened[place] = (free - len(document), row)
        rows[row].append(document)
    ids = np.full((len(rows), ROW_TOKENS), pad, np.int16)
    numbers = np.zeros((len(rows), ROW_TOKENS), np.int16)
    for row, members in enumerate(rows):
        joined = [token for member in members for token in member]
        ids[row, : len(joined)] = joined
        numbers[row, : len(joined)] = np.repeat(np.arange(1, len(members) + 1), [len(member) for member in members])
    return ids, numbers


def pretrain(
    folder: Path, rows: tuple[torch.Tensor, torch.Tensor], num_tokens: int, batch_rows: int, device: str,
    say: Callable[[str], None],
) -> LlamaForCausalLM:  # fmt: skip
    """Train the model of a folder on `num_tokens`, padding included; the rows repeat when they are fewer."""
    torch.backends.cuda.matmul.allow_tf32 = True  # the weights stay float32; a random start needs no more digits
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    model.to(device).train()  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY,
                                  fused=device != "cpu")  # fmt: skip
    num_steps = max(1, num_tokens // (batch_rows * ROW_TOKENS))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, num_steps))
    rows = (rows[0].to(device), rows[1].to(device))
    progress = Progress("base", "step", num_steps)
    for step in range(num_steps):
        pick = torch.arange(step * batch_rows, (step + 1) * batch_rows, device=device) % len(rows[0])
        loss = batch_loss(model, rows[0][pick].long(), rows[1][pick])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 49 or step == num_steps - 1:
            progress.update(step + 1, loss=f"{loss.item():.3f}")
    say(f"base          {num_steps:,} steps of {batch_rows * ROW_TOKENS:,} tokens, last loss {loss.item():.3f}")
    return model


def batch_loss(model: LlamaForCausalLM, ids: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """Mean loss over every token that follows one of its own document; `ids` and `documents` are (B, T)."""
    place = torch.arange(ids.shape[1], device=ids.device)  # (T,)
    is_first = torch.ones_like(documents, dtype=torch.bool)
    is_first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    positions = place - torch.where(is_first, place, 0).cummax(dim=1).values  # (B, T), from 0 in each document
    sees = (documents[:, :, None] == documents[:, None, :]) & (place[:, None] >= place)  # (B, T, T)
    logits = model(input_ids=ids, attention_mask=sees[:, None], position_ids=positions, use_cache=False).logits
    targets = ids.masked_fill(is_first | (documents == 0), -100)[:, 1:]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten())


def lr_factor(step: int, num_steps: int) -> float:
    """Linear warmup, then a cosine to the floor."""
    warmup = max(1, round(num_steps * WARMUP_RATIO))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, num_steps - 1 - warmup)
    return MIN_LR_RATIO + (1 - MIN_LR_RATIO) * 0.5 * (1 + math.cos(math.pi * done))
