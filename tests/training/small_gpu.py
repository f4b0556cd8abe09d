"""The real worker on a machine whose memory ends: `python -m tests.training.small_gpu DIR`.

Micro-batches of more than `MOST_ROWS` rows fail at step `FULL_AT_STEP`, as a longer document than before would make them.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from tasks.stage import read_order
from tasks.training.__main__ import main

MOST_ROWS, FULL_AT_STEP = 2, 8

if __name__ == "__main__":
    from tasks.training.trainer import RowTrainer

    directory = Path(sys.argv[1])
    rows = read_order(directory).how["microbatch_rows"]
    step = RowTrainer.training_step

    def training_step(self: RowTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if rows > MOST_ROWS and self.state.global_step + 1 == FULL_AT_STEP:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step(self, *args, **kwargs)

    RowTrainer.training_step = training_step  # type: ignore[method-assign]
    sys.exit(main(directory))
