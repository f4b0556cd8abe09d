"""Spilling: token ids and an index of documents on disk, so that memory does not grow with the corpus.

`tokens.bin` holds the ids of all clean documents end to end, int32, `~id` where a token is not trained on.
`index.bin` holds one `DOCUMENT` for every record read. Both are memory-mapped afterwards; `forget` gives their pages
back, since the kernel counts mapped pages into the process's memory.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tasks.preparation.clean import OK
from tasks.preparation.encode import Encoded

# 44 bytes a document: 2 % of a text of 2 KB.
DOCUMENT = np.dtype([
    ("hash", "<u8", 2), ("offset", "<i8"), ("length", "<i4"), ("supervised", "<i4"), ("file", "<i4"), ("line", "<i4"),
    ("source", "<i2"), ("status", "i1"), ("pad", "i1"),
])  # fmt: skip
CHUNK_DOCUMENTS = 1 << 20  # documents that a pass over the index takes at a time


class Spill:
    """Appends encoded blocks; counts what it got."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.num_tokens, self.num_documents = folder, 0, 0
        self._tokens = (folder / "tokens.bin").open("wb")
        self._index = (folder / "index.bin").open("wb")

    def append(self, encoded: Encoded) -> None:
        """Write a block's documents."""
        documents = np.zeros(len(encoded.status), dtype=DOCUMENT)
        kept_lengths = np.where(encoded.status == OK, encoded.lengths, 0)
        documents["offset"] = self.num_tokens + np.cumsum(kept_lengths) - kept_lengths
        documents["hash"], documents["length"] = encoded.hashes, encoded.lengths
        documents["supervised"], documents["line"] = encoded.supervised, encoded.lines
        documents["source"], documents["file"], documents["status"] = encoded.source, encoded.file, encoded.status
        self._index.write(documents.data)
        assert encoded.ids.dtype == np.int32, encoded.ids.dtype
        self._tokens.write(encoded.ids.data)
        self.num_tokens += len(encoded.ids)
        self.num_documents += len(documents)

    def close(self) -> tuple[np.ndarray, np.ndarray]:
        """The tokens (read only) and the index (writable), memory-mapped."""
        self._tokens.close()
        self._index.close()
        if not self.num_tokens:
            return np.empty(0, np.int32), np.fromfile(self.folder / "index.bin", DOCUMENT)
        tokens = np.memmap(self.folder / "tokens.bin", dtype=np.int32, mode="r")
        return tokens, np.memmap(self.folder / "index.bin", dtype=DOCUMENT, mode="r+")


def chunks(num_items: int) -> Iterator[slice]:
    """Slices that cover an index, a chunk at a time."""
    for start in range(0, num_items, CHUNK_DOCUMENTS):
        yield slice(start, min(start + CHUNK_DOCUMENTS, num_items))


def forget(array: np.ndarray) -> None:
    """Give back the memory of a mapped file's pages; they stay on disk, changes included."""
    mapped = getattr(array, "_mmap", None)
    if mapped is not None:
        if array.flags.writeable:
            mapped.flush()
        mapped.madvise(mmap.MADV_DONTNEED)
