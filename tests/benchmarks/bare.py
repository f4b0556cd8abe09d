"""The bare tokenizer, for the benchmark: `encode_batch` of all texts on all cores; prints wall and CPU seconds of that alone."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "true"

from tokenizers import Tokenizer

BATCH_TEXTS = 1000  # an Encoding takes about 100 bytes a token: not all texts at once


def main(model: Path, corpus: Path) -> None:
    """Encode every text of the corpus."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    with corpus.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    began, cpu_began = time.monotonic(), time.process_time()
    for start in range(0, len(texts), BATCH_TEXTS):
        tokenizer.encode_batch(texts[start : start + BATCH_TEXTS])
    print(time.monotonic() - began, time.process_time() - cpu_began)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
