"""Exact duplicates, within and across sources: of equal documents the first in reading order stays.

Equal means equal after cleaning; told by 128-bit hashes, so that among 10^12 documents the chance of one wrong drop
is below 10^-14. Documents are compared in buckets of their hash, so that memory does not grow with their number.
"""

from __future__ import annotations

import numpy as np

from tasks.preparation.clean import DUPLICATE, OK
from tasks.preparation.spill import chunks, forget

BUCKET_DOCUMENTS = 1 << 22


def mark_duplicates(index: np.ndarray) -> dict[int, tuple[int, int]]:
    """Set the status of duplicates in the index; returns per source the first one and the document that it repeats."""
    num_buckets = -(-len(index) // BUCKET_DOCUMENTS)
    examples: dict[int, tuple[int, int]] = {}
    for bucket in range(num_buckets):
        numbers = _bucket(index, bucket, num_buckets)
        if len(numbers) < 2:
            continue
        hashes = index["hash"][numbers]
        order = np.lexsort((numbers, hashes[:, 1], hashes[:, 0]))
        numbers, hashes = numbers[order], hashes[order]
        repeats = np.r_[False, (hashes[1:] == hashes[:-1]).all(axis=1)]
        firsts = numbers[np.maximum.accumulate(np.where(repeats, 0, np.arange(len(numbers))))]
        index["status"][numbers[repeats]] = DUPLICATE
        _keep_first_examples(examples, index["source"], numbers[repeats], firsts[repeats])
        forget(index)
    return examples


def _bucket(index: np.ndarray, bucket: int, num_buckets: int) -> np.ndarray:
    found = []
    for part in chunks(len(index)):
        chosen = index["status"][part] == OK
        if num_buckets > 1:
            chosen &= index["hash"][part][:, 0] % np.uint64(num_buckets) == np.uint64(bucket)
        found.append(np.flatnonzero(chosen) + part.start)
    return np.concatenate(found) if found else np.empty(0, dtype=np.int64)


def _keep_first_examples(
    examples: dict[int, tuple[int, int]], sources: np.ndarray, repeats: np.ndarray, firsts: np.ndarray
) -> None:
    for source in np.unique(sources[repeats]).tolist():
        mine = np.flatnonzero(sources[repeats] == source)
        first = mine[np.argmin(repeats[mine])]
        found = (int(repeats[first]), int(firsts[first]))
        examples[source] = min(found, examples.get(source, found))
