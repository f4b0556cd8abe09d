"""Attention that keeps the documents of a packed row apart, exactly and without a (T, T) mask.

Registered with transformers as `steep_isolated`; the lengths of the documents travel through the model as
keyword arguments.
- On a CPU, one causal SDPA call a document. Forward + backward of a row of 512 with documents of 73 tokens
  on average, one thread: 4.2 ms; the block mask that transformers would build takes 13.4 ms, ignoring the
  borders 9.6 ms.
- On a GPU in bf16, torch's `varlen_attn` (FlashAttention over cumulative lengths): faster than ignoring the
  borders, because it computes less.
- On a GPU in float32, which that kernel does not know, documents of similar length share one padded causal
  call (lengths rounded up to a power of two: at most 2x the tokens, a handful of calls for any number of
  documents).

Models with soft-capped scores, or with sliding windows shorter than a row, keep transformers' own block mask,
made from the position ids.

Letters: T tokens, H heads, D width of a head, N documents of a bucket, L the bucket's length.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface

ISOLATED = "steep_isolated"
SMALLEST_BUCKET = 32
ASKS_FOR_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters  # 2.11 takes fewer key heads unasked
REFUSED = ("softcap", "s_aux", "position_bias")  # what transformers' models pass that changes the scores


def choose_attention(config: Any, seq_len: int) -> str:
    """The attention implementation for a model's config and rows of up to `seq_len` tokens."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    known = kinds <= {"full_attention", "sliding_attention"}
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    windowed = window is not None and window < seq_len
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    passes_lengths = model_class is not None and model_class._supports_attention_backend
    plain = known and not windowed and not getattr(text, "attn_logit_softcapping", None)
    return ISOLATED if plain and passes_lengths else "sdpa"


def attention_plan(
    implementation: str, device_type: str, bf16: bool = False
) -> Callable[[Sequence[int]], dict[str, Any]]:
    """The function from the documents' lengths to the keyword arguments that the attention needs.

    `bf16`: the matrix products are.
    """
    if implementation != ISOLATED:
        return lambda lengths: {}
    if device_type == "cpu":
        return lambda lengths: {"document_lengths": tuple(lengths)}
    return plan_bounds if bf16 else plan_buckets


def plan_bounds(lengths: Sequence[int]) -> dict[str, Any]:
    """Where documents begin and end, for `varlen_attn`.

    Exact numbers: the kernel starts a block for every tile of every document as if each were the longest, and with
    bounds filled up to 128 and the row's length as the longest took 3.3 ms in place of 2.4 (16,384 tokens in 36
    documents, 32 heads, forward and backward, H200). Compiled layers take both numbers as variables.
    """
    bounds = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    bounds[1:] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
    return {"document_bounds": bounds, "longest_document": max(lengths)}


def plan_buckets(lengths: Sequence[int]) -> dict[str, Any]:
    """Which token goes where when documents of similar length are padded to a common one."""
    buckets: dict[int, list[tuple[int, int]]] = {}
    start = 0
    for length in lengths:
        bucket = max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())
        buckets.setdefault(bucket, []).append((start, length))
        start += length
    total = start
    take, restore, offset = [], torch.empty(total, dtype=torch.long), 0
    for bucket, documents in buckets.items():
        index = torch.empty(len(documents), bucket, dtype=torch.long)
        for row, (first, length) in enumerate(documents):
            # Padding reads on into what follows: causal, so nobody sees it. (Token 0 for all of it would be
            # wrong in nothing but speed: the backward pass adds up one token's gradients one after another.)
            index[row] = torch.arange(first, first + bucket).clamp(max=total - 1)
            restore[first : first + length] = offset + row * bucket + torch.arange(length)
        take.append(index)  # (N, L)
        offset += index.numel()
    return {"bucket_take": take, "bucket_restore": restore}


def isolated_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # (1, H, T, D)
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    document_lengths: tuple[int, ...] | None = None,
    document_bounds: torch.Tensor | None = None,
    longest_document: int = 0,
    bucket_take: list[torch.Tensor] | None = None,
    bucket_restore: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document."""
    assert attention_mask is None and query.shape[0] == 1, "documents are told apart by their lengths, in one flat row"
    extra = [name for name in REFUSED if kwargs.get(name) is not None]
    assert not extra, f"this model's attention needs {extra}, which {ISOLATED} does not compute"
    if document_bounds is not None:
        return _attend_at_bounds(query, key, value, document_bounds, longest_document, scaling), None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling)

    if bucket_take is not None and bucket_restore is not None:
        out = _attend_in_buckets(attend, (query, key, value), bucket_take, bucket_restore)
    else:
        assert document_lengths is not None, "the documents' lengths are missing"
        pieces = [torch.split(x, list(document_lengths), dim=2) for x in (query, key, value)]
        out = torch.cat([attend(*qkv) for qkv in zip(*pieces, strict=True)], dim=2)
    return out.transpose(1, 2).contiguous(), None


def _attend_at_bounds(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, longest: int,
    scaling: float | None,
) -> torch.Tensor:  # fmt: skip
    if torch.is_autocast_enabled("cuda"):  # a norm of queries and keys leaves float32 behind, which the kernel refuses
        query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))
    scale = scaling if scaling is not None else 1 / math.sqrt(query.shape[-1])
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H, D)
    more: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1]} if ASKS_FOR_GROUPS else {}
    out: Any = varlen_attn(
        query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=(-1, 0), **more
    )
    return out[None]  # type: ignore[no-any-return]  # (1, T, H, D)


def _attend_in_buckets(
    attend: Callable[..., torch.Tensor], qkv: Sequence[torch.Tensor], take: list[torch.Tensor], restore: torch.Tensor
) -> torch.Tensor:
    flat = [x[0].transpose(0, 1) for x in qkv]  # (T, H, D)
    outs = []
    for index in take:
        padded = [x[index].transpose(1, 2) for x in flat]  # (N, H, L, D)
        outs.append(attend(*padded).transpose(1, 2).flatten(0, 1))  # (N * L, H, D)
    return torch.cat(outs)[restore].transpose(0, 1)[None]  # (1, H, T, D)


AttentionInterface.register(ISOLATED, isolated_attention)
