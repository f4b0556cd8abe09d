"""How many CPU threads a model is worth. It decides a result's last bits, so it follows from the model and the machine.

A small model's matrices are too small to share: on two shared cores 64 generations of a 1M-parameter model took 5 s
with one thread and 18 to 38 s with two. Training has larger matrices: 1.5M parameters ran at 3,700 tokens/s with one
thread and 5,900 with two, on two idle cores.
"""

from __future__ import annotations

PARAMETERS_A_THREAD = {"generate": 50_000_000, "train": 700_000}


def choose_threads(num_parameters: int, cores: int, work: str) -> int:
    """Threads for a model of that size; `work` is `generate` or `train`."""
    return max(1, min(cores, num_parameters // PARAMETERS_A_THREAD[work]))
