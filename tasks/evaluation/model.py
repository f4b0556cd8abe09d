"""lm-eval's Hugging Face model, with two things added: progress for the person who waits, and batches that fit.

lm-eval takes one batch size for everything. Scoring keeps the logits of every position (vocabulary x tokens),
generation keeps a key-value cache, so what fits differs by orders of magnitude; each kind of request gets its own
number of rows, a function of the requests alone, so that base, CPT and SFT are scored in the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from tasks.errors import UserError
from tasks.progress import Progress
from tasks.threads import choose_threads
from tasks.trust import trusted

# On a CPU core larger batches leave the caches: 120 answers of a 1.5M model took 6.2 CPU-s at 16 rows, 7.8 at 64 and
# 10.5 at 128.
MAX_ROWS = {"cpu": 16, "cuda": 128}
# Longer documents are scored in windows; it bounds the logits of one row (8,192 x 150k x 4 bytes = 4.9 GB).
MAX_LENGTH_TOKENS = 8192
BATCH_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}  # logits or key-value cache of one batch


def load_model(folder: str, stage: str, device: str, threads: int | None, dtype: str = "float32") -> WatchedLM:
    """The model of a local folder. Only safetensors are read. Scores are summed in float32, whatever it computes in."""
    try:
        # use_safetensors reaches from_pretrained: pickled weights are refused
        model = WatchedLM(stage, pretrained=folder, device=device, dtype=dtype, use_safetensors=True,
                          softmax_dtype="float32", trust_remote_code=trusted())  # fmt: skip
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"the model does not load: {str(error).splitlines()[0]}",
            where=str(Path(folder)),
            allowed="a folder with config.json, safetensors and a tokenizer",
        ) from error
    cores = torch.get_num_threads()
    torch.set_num_threads(threads or choose_threads(model.model.num_parameters(), cores, "generate"))
    return model


def rows_that_fit(longest_tokens: int, bytes_a_token: int, device: str) -> int:
    """Requests of `longest_tokens` that one batch may hold."""
    return max(1, min(MAX_ROWS[device], BATCH_BYTES[device] // max(1, longest_tokens * bytes_a_token)))


class WatchedLM(HFLM):  # type: ignore[misc]
    """HFLM that says how far it is and sizes its batches."""

    def __init__(self, stage: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.stage = stage
        self._progress: Progress | None = None
        self._done = self._forwards = self._num_tokens = 0
        self.model.register_forward_hook(lambda _, inputs, named, __: self._tick(*inputs, **named), with_kwargs=True)

    @property
    def max_length(self) -> int:
        """Tokens of the longest window."""
        return min(super().max_length, MAX_LENGTH_TOKENS)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Scores of continuations after their contexts."""
        longest = max(self._count("".join(request.args)) for request in requests)
        with self._watched("continuations scored", requests, longest, self._logit_bytes()):
            return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Scores of whole documents, longest first: lm-eval would pad neighbours of any length to one another."""
        lengths = [self._count(request.args[0]) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: -lengths[i])
        with self._watched("documents scored", requests, max(lengths), self._logit_bytes()):
            scores = super().loglikelihood_rolling([requests[i] for i in order], disable_tqdm=True)
        by_request = dict(zip(order, scores, strict=True))
        return [by_request[i] for i in range(len(requests))]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy (or as the task says) answers to prompts."""
        longest = max(
            self._count(request.args[0]) + int(request.args[1].get("max_gen_toks", self.max_gen_toks))
            for request in requests
        )
        with self._watched("answers generated", requests, longest, self._cache_bytes()):
            answers: list[str] = super().generate_until(requests, disable_tqdm=True)
        return answers

    def _loglikelihood_tokens(self, *arguments: Any, **named: Any) -> list[tuple[float, bool]]:
        return super()._loglikelihood_tokens(*arguments, **(named | {"disable_tqdm": True}))  # rolling asks for a bar

    def _model_call(self, inps: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        logits: torch.Tensor = super()._model_call(inps, *arguments, **named)
        self._done += len(inps)
        return logits

    def _model_generate(self, context: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        self._forwards = 0
        tokens: torch.Tensor = super()._model_generate(context, *arguments, **named)
        self._done += len(context)
        return tokens

    @contextmanager
    def _watched(self, what: str, requests: list[Instance], longest: int, bytes_a_token: int) -> Iterator[None]:
        self.batch_size_per_gpu = rows_that_fit(min(longest, self.max_length), bytes_a_token, self.device.type)
        self._progress, self._done, self._num_tokens = Progress(self.stage, what, len(requests)), 0, 0
        self._say_tokens = what.startswith("answers")
        yield
        self._progress.update(len(requests), **{"": self._progress.speed(self._num_tokens)})
        self._progress = None

    def _tick(self, input_ids: torch.Tensor, **_: Any) -> None:
        """After every forward pass; its tokens were read, or generated by the one before. Batches of one context and
        windows make rows differ from requests, so the count stays below the total until the end."""
        self._forwards += 1
        self._num_tokens += input_ids.numel()
        if self._progress:
            extra = {"token": f"{self._forwards:,}"} if self._say_tokens else {}
            speed = self._progress.speed(self._num_tokens)
            self._progress.update(min(self._done, self._progress.total - 1), **extra, **{"": speed})

    def _count(self, text: str) -> int:
        return len(self.tokenizer.encode(text))

    def _logit_bytes(self) -> int:
        return 4 * self._text_config().vocab_size

    def _cache_bytes(self) -> int:
        config = self._text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(2 * 4 * config.num_hidden_layers * heads * head_dim)  # keys and values, float32

    def _text_config(self) -> Any:
        return self.model.config.get_text_config()
