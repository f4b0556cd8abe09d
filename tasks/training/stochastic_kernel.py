"""One pass over a parameter for the 8-bit AdamW step, as a Triton kernel.

torchao's step, compiled by torch, looks every code up by a search through a table of 256 values and draws its noise by
Philox: 145 ms a step for an 8B model on an H200, where reading and writing everything once takes 20. This kernel
takes 53 (`python -m tests.benchmarks.gpu.optimizer`): it computes codes and noise instead.

The codes are the dynamic tree of Dettmers et al. (arXiv:2110.02861) as torchao's table has them. From 1e-6 to 1,
decade `i` (0 to 6) is cut into 2^(i + UNSIGNED) equal cells, and a code stands for the middle of its cell; two more
codes stand for 0 and 1. With n = 2^e + k for cell k of 2^e, the float of n holds e as its exponent and k / 2^e as its
mantissa. Signed codes are 127 - n, 127 and 127 + n; unsigned ones n - 1.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 256  # neighbours that share a scale: torchao's block_size
BLOCKS_A_PROGRAM, WARPS = 4, 4  # 53.4 ms for 8B; 1 to 16 blocks take 53 to 65
LOG2_OF_10 = tl.constexpr(3.321928094887362)


def step_in_one_pass(
    parameter: torch.Tensor, gradient: torch.Tensor, exp_avg: Any, exp_avg_sq: Any, *, step: float, lr: float,
    betas: tuple[float, float], weight_decay: float, eps: float, seed: int,
) -> None:  # fmt: skip
    """Update a bf16 parameter and its two `OptimState8bit` in place; contiguous CUDA tensors of one shape.

    `seed` (31 bits) decides the rounding: another one for each parameter and step.
    """
    num_blocks, (beta1, beta2) = exp_avg.scale.numel(), betas
    assert parameter.is_contiguous() and parameter.numel() == num_blocks * BLOCK, (parameter.shape, num_blocks)
    _kernel[(triton.cdiv(num_blocks, BLOCKS_A_PROGRAM),)](
        parameter, gradient.contiguous(), exp_avg.codes, exp_avg.scale, exp_avg_sq.codes, exp_avg_sq.scale, num_blocks,
        lr, beta1, beta2, weight_decay, eps, 1 - beta1**step, (1 - beta2**step) ** 0.5, seed,
        BLOCK=BLOCK, BLOCKS=BLOCKS_A_PROGRAM, num_warps=WARPS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_blocks", "seed"])
def _kernel(  # type: ignore[no-untyped-def]
    p_ptr, g_ptr, m_ptr, m_scale_ptr, v_ptr, v_scale_ptr, num_blocks, lr, beta1, beta2, weight_decay, eps,
    correction1, correction2_root, seed, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)  # (BLOCKS,)
    real_block = block < num_blocks
    at = block[:, None].to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None]  # (BLOCKS, BLOCK)
    real = real_block[:, None]

    p = tl.load(p_ptr + at, mask=real, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + at, mask=real, other=0.0).to(tl.float32)
    signed = tl.load(m_ptr + at, mask=real, other=127).to(tl.int32) - 127
    size = tl.abs(signed)
    m = tl.where(size == 0, 0.0, tl.where(size == 128, 1.0, _value(size, UNSIGNED=0)))
    m = tl.where(signed < 0, -m, m) * tl.load(m_scale_ptr + block, mask=real_block, other=1.0)[:, None]
    code = tl.load(v_ptr + at, mask=real, other=0).to(tl.int32)
    v = tl.where(code == 0, 0.0, tl.where(code == 255, 1.0, _value(code + 1, UNSIGNED=1)))
    v = v * tl.load(v_scale_ptr + block, mask=real_block, other=1.0)[:, None]

    # The order of torchao's `single_param_adam`.
    p = p - lr * weight_decay * p
    m = m + (1 - beta1) * (g - m)
    v = v + (1 - beta2) * (g * g - v)
    p = p - lr * (m / correction1) / (tl.sqrt(v) / correction2_root + eps)

    # 1e-12: no scale is zero.
    m_scale = tl.maximum(tl.max(tl.abs(m), axis=1), 1e-12)
    share = tl.abs(m) / m_scale[:, None]
    size = tl.where(share < 0.275e-6, 0, _cell(share, UNSIGNED=0))  # half of the smallest value, 0.55e-6
    size = tl.where((m > 0) & (share >= 1 - 0.225 / 64), 128, size)  # nearer to 1 than to the last cell's middle
    tl.store(m_ptr + at, (127 + tl.where(m < 0, -size, size)).to(tl.uint8), mask=real)
    tl.store(m_scale_ptr + block, m_scale, mask=real_block)
    v_scale = tl.maximum(tl.max(v, axis=1), 1e-12)
    share = v / v_scale[:, None]
    code = tl.where(share < 0.1625e-6, 0, _cell(share, UNSIGNED=1) - 1)  # half of the smallest value, 0.325e-6
    code = tl.where(share >= 1 - 0.225 / 128, 255, code)
    tl.store(v_ptr + at, code.to(tl.uint8), mask=real)
    tl.store(v_scale_ptr + block, v_scale, mask=real_block)

    # To bf16: noise below the last kept bit carries into it as often as what is cut off is large.
    bits = p.to(tl.uint32, bitcast=True) + (_mixed(at.to(tl.uint32) ^ seed) & 0xFFFF)
    tl.store(p_ptr + at, (bits & 0xFFFF0000).to(tl.float32, bitcast=True).to(tl.bfloat16), mask=real)


@triton.jit
def _value(n, UNSIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The middle of cell n = 2^e + k, in decade e - UNSIGNED; not for the codes of 0 and 1."""
    bits = n.to(tl.float32).to(tl.int32, bitcast=True)
    biased = bits >> 23  # e + 127
    one_and_share = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)  # 1 + k / 2^e
    half_cell = ((253 - biased) << 23).to(tl.float32, bitcast=True)  # 0.5 / 2^e
    decade = tl.exp2((biased - (127 + UNSIGNED) - 6).to(tl.float32) * LOG2_OF_10)
    return decade * (0.1 + 0.9 * (one_and_share - 1.0 + half_cell))


@triton.jit
def _cell(share, UNSIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """n = 2^e + k of the cell whose middle is nearest to a magnitude in (0, 1)."""
    # Where two decades meet, the finer cells of the lower one reach less far up: the border lies in the middle
    # between the middles of both neighbours.
    coarse: tl.constexpr = 0.9 if UNSIGNED else 1.8
    decade = (share >= 1e-6 * (1 + coarse / 2)).to(tl.int32)
    decade += (share >= 1e-5 * (1 + coarse / 4)).to(tl.int32)
    decade += (share >= 1e-4 * (1 + coarse / 8)).to(tl.int32)
    decade += (share >= 1e-3 * (1 + coarse / 16)).to(tl.int32)
    decade += (share >= 1e-2 * (1 + coarse / 32)).to(tl.int32)
    decade += (share >= 1e-1 * (1 + coarse / 64)).to(tl.int32)
    cells = ((decade + (127 + UNSIGNED)) << 23).to(tl.float32, bitcast=True)  # 2^e
    k = (share * tl.exp2((6 - decade).to(tl.float32) * LOG2_OF_10) - 0.1) * (cells * (1 / 0.9))
    return cells.to(tl.int32) + tl.minimum(tl.maximum(k, 0.0), cells - 1.0).to(tl.int32)


@triton.jit
def _mixed(x):  # type: ignore[no-untyped-def]
    """A bijection of 32 bits in which every bit in changes every bit out half of the time (Wellons' lowbias32)."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)
