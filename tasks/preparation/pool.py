"""The pool: blocks are encoded by spawned processes and come back in the order they were read.

Spawned, not forked: a forked child of a process with threads (Arrow, tokenizers) may hang. With one process, or
little text, everything happens here, because a process takes 0.5 s to start. The output is the same either way.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from tasks.preparation.encode import Encoded, Encoder
from tasks.preparation.sources import Block, SourcePlan
from tasks.preparation.tokenizer import Settled

POOL_FROM_BYTES = 4_000_000  # about 2 s of one core
PR_SET_PDEATHSIG = 1
_encoder: list[Encoder] = []  # of a pool's process: one


def encode_all(
    blocks: Iterable[Block], settled: Settled, plans: list[SourcePlan], seq_len: int, processes: int
) -> Iterator[Encoded]:
    """Encode every block; results in the order of the blocks, at most a few blocks in memory."""
    if processes <= 1:
        encoder = Encoder(settled, plans, seq_len)
        yield from map(encoder.encode, blocks)
        return
    context = multiprocessing.get_context("spawn")
    arguments = (settled, plans, seq_len, os.getpid())
    pool = ProcessPoolExecutor(processes, context, initializer=_start, initargs=arguments)
    try:
        waiting: deque[Future[Encoded]] = deque()
        for block in blocks:
            waiting.append(pool.submit(_encode, block))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise RuntimeError("a process of the pool was killed; when memory ran out, use fewer processes") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(settled: Settled, plans: list[SourcePlan], seq_len: int, parent: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a killed parent leaves nothing behind
    if os.getppid() != parent:
        os._exit(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a process; the pool is the parallelism
    _encoder.append(Encoder(settled, plans, seq_len))


def _encode(block: Block) -> Encoded:
    return _encoder[0].encode(block)
