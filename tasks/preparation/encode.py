"""Encoding: one block of raw records becomes token ids and a few numbers a document. Runs in the pool's processes.

parse -> text or messages -> clean -> hash -> tokenize. Each record is tokenized once, with special tokens' spellings
taken as text; EOS goes to the end of a document. Records that cleaning drops are counted in tokens too, for the
ledger.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
import orjson

from tasks.errors import UserError
from tasks.preparation.chat import ChatEncoder
from tasks.preparation.clean import EMPTY, OK, clean_chat, clean_text
from tasks.preparation.readers import Located
from tasks.preparation.records import chat_messages, document_text, parse_lines
from tasks.preparation.sources import Block, SourcePlan
from tasks.preparation.tokenizer import Settled, load_backend

Hashed = tuple[list[int], list[bytes], list[np.ndarray]]  # status, hash and ids of each record

# Words whose tokens are remembered; the library's 10,000 cost 5 % of the speed, and more than this brings nothing.
CACHED_WORDS = 1 << 16
TEXTS_A_CALL = 64  # an Encoding takes about 100 bytes a token, so few are held at a time


@dataclass(frozen=True)
class Encoded:
    """A block's documents. Arrays of `status` and so on hold one entry a record."""

    block_bytes_read: int
    source: int
    file: int
    status: np.ndarray  # (N,) int8: clean.OK or a reason
    lines: np.ndarray  # (N,) int64
    lengths: np.ndarray  # (N,) int32 tokens
    supervised: np.ndarray  # (N,) int32 tokens trained on; for chats within the first seq_len
    hashes: np.ndarray  # (N, 2) uint64
    ids: np.ndarray  # int32; the ids of all records with status OK, end to end; `~id` where not trained on
    fields: list[str]  # of the first record
    num_with_input: int  # records that hold the field mapped as Alpaca's `input`
    num_with_crlf: int  # documents with status OK that hold Windows line ends


class Encoder:
    """What a process keeps: tokenizers, template, sources."""

    def __init__(self, settled: Settled, plans: list[SourcePlan], seq_len: int) -> None:
        self.settled, self.plans, self.seq_len = settled, plans, seq_len
        self.plain = load_backend(settled)
        if hasattr(self.plain.model, "_resize_cache"):
            self.plain.model._resize_cache(CACHED_WORDS)
        self.plain.encode_special_tokens = True  # a spelled `<|endoftext|>` is text
        added = self.plain.get_added_tokens_decoder()
        unknown = settled.template_variables.get("unk_token")
        special = {i: token.content for i, token in added.items() if token.special and token.content != unknown}
        self.is_special = np.zeros(max([*special, self.plain.get_vocab_size()]) + 1, dtype=bool)
        self.is_special[list(special)] = True
        self.spelling = re.compile("|".join(re.escape(text) for text in special.values()))
        self.chat = None
        if settled.template is not None:
            self.chat = ChatEncoder(settled.template, settled.template_variables, load_backend(settled), self.plain)

    def encode(self, block: Block) -> Encoded:
        """Everything that is done to a record before documents meet each other."""
        plan = self.plans[block.source]
        payload = block.payload
        located = parse_lines(payload, block.path, block.first_line) if isinstance(payload, bytes) else payload
        lines = np.array([line for line, _ in located], dtype=np.int64)
        if plan.is_chat:
            status, hashes, ids = self._chats(located, plan, block.path)
        else:
            status, hashes, ids = self._documents(located, plan, block.path)
        lengths = np.array([len(one) for one in ids], dtype=np.int32)
        supervised = np.array([np.count_nonzero(one[: self.seq_len] >= 0) for one in ids], dtype=np.int32)
        kept = [one for one, reason in zip(ids, status, strict=True) if reason == OK]
        return Encoded(
            block.bytes_read, block.source, block.file, np.array(status, dtype=np.int8), lines, lengths, supervised,
            np.frombuffer(b"".join(hashes), dtype=np.uint64).reshape(-1, 2),
            np.concatenate(kept) if kept else np.empty(0, dtype=np.int32),
            list(located[0][1]) if located else [], sum(plan.fields.get("input") in record for _, record in located),
            0 if plan.is_chat else _num_with_crlf(located, plan.fields["text"], status),
        )  # fmt: skip

    def _documents(self, located: list[Located], plan: SourcePlan, path: str) -> Hashed:
        raw = [document_text(record, plan.fields, f"{path}:{line}") for line, record in located]
        texts, status = zip(*(clean_text(text, plan.min_chars) for text in raw), strict=True) if raw else ((), ())
        hashes = [_hash(text.encode(), b"text") for text in texts]
        head, tail = list(self.settled.prefix_ids), [self.settled.eos_id]
        ids: list[np.ndarray] = []
        for start in range(0, len(texts), TEXTS_A_CALL):
            batch = texts[start : start + TEXTS_A_CALL]
            encodings = self.plain.encode_batch_fast(batch, add_special_tokens=False)
            ids += [np.array(head + encoding.ids + tail, dtype=np.int32) for encoding in encodings]
        nothing = np.empty(0, dtype=np.int32)
        ids = [nothing if reason == EMPTY else one for one, reason in zip(ids, status, strict=True)]
        self._refuse_specials_inside(ids, texts, [f"{path}:{line}" for line, _ in located])
        return list(status), hashes, ids

    def _chats(self, located: list[Located], plan: SourcePlan, path: str) -> Hashed:
        assert self.chat is not None
        wheres = [f"{path}:{line}" for line, _ in located]
        raw = [chat_messages(record, plan.kind, plan.fields, where)
               for (_, record), where in zip(located, wheres, strict=True)]  # fmt: skip
        chats, status = zip(*(clean_chat(chat) for chat in raw), strict=True) if raw else ((), ())
        hashes = [_hash(orjson.dumps(chat, option=orjson.OPT_SORT_KEYS), b"chat") for chat in chats]
        ids: list[np.ndarray] = []
        for start in range(0, len(chats), TEXTS_A_CALL):
            stop = start + TEXTS_A_CALL
            ids += self.chat.encode(list(chats[start:stop]), wheres[start:stop])
        return list(status), hashes, ids

    def _refuse_specials_inside(self, ids: list[np.ndarray], texts: tuple[str, ...], wheres: list[str]) -> None:
        """EOS is never inside. Some vocabularies (Unigram) hold a special token's spelling as an ordinary piece too."""
        if not ids:
            return
        head = len(self.settled.prefix_ids)
        if not self.is_special[np.concatenate([one[head:-1] for one in ids])].any():
            return
        for i, one in enumerate(ids):
            if self.is_special[one[head:-1]].any():
                ids[i] = self._encode_broken_up(texts[i])
                if self.is_special[ids[i][head:-1]].any():
                    raise UserError("the tokenizer makes a special token out of the document's text", where=wheres[i])

    def _encode_broken_up(self, text: str) -> np.ndarray:
        """Encode with every spelling of a special token cut after its first character."""
        cuts = [0, *(match.start() + 1 for match in self.spelling.finditer(text)), len(text)]
        pieces = [self.plain.encode(text[a:b], add_special_tokens=False).ids for a, b in pairwise(cuts)]
        whole = [*self.settled.prefix_ids, *chain.from_iterable(pieces), self.settled.eos_id]
        return np.array(whole, dtype=np.int32)


def _num_with_crlf(located: list[Located], text: str, status: list[int]) -> int:
    return sum(reason == OK and "\r\n" in record[text] for (_, record), reason in zip(located, status, strict=True))


def _hash(data: bytes, kind: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16, person=kind).digest()
