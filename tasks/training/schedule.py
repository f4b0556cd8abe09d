"""The learning rate of every step: linear warmup to the peak, then a cosine that ends at the floor.

Step 0 already learns (`1 / warmup_steps` of the peak), the last warmup step is at the peak, and the last
step of all is at exactly `min_lr_ratio`. (transformers' `cosine_with_min_lr` gives step 0 a rate of 0 and
never reaches its floor.)
"""

from __future__ import annotations

import math


def warmup_steps(num_steps: int, warmup_ratio: float) -> int:
    """Steps of warmup; at least one step is left for the descent."""
    return min(math.ceil(num_steps * warmup_ratio), num_steps - 1)


def lr_factor(step: int, num_steps: int, warmup_ratio: float, min_lr_ratio: float) -> float:
    """The share of the peak rate at `step`, counted from 0."""
    warmup = warmup_steps(num_steps, warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    peak_step = max(warmup - 1, 0)
    if step >= num_steps - 1:  # exact, whatever cos(pi) rounds to; the scheduler also asks for one step beyond the last
        return min_lr_ratio
    progress = (step - peak_step) / (num_steps - 1 - peak_step)
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
