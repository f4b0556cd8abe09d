"""Cleaning: Unicode NFC, and what is dropped for itself. Duplicates are found later, among all documents (dedup.py)."""

from __future__ import annotations

import unicodedata

from tasks.preparation.records import Message

# A document's status; the ledger and the index use these numbers.
OK, EMPTY, SHORT, DUPLICATE, OVERFLOW, UNSUPERVISED = range(6)
REASONS = {EMPTY: "empty", SHORT: "short", DUPLICATE: "duplicate", OVERFLOW: "overflow", UNSUPERVISED: "unsupervised"}


def clean_text(text: str, min_chars: int) -> tuple[str, int]:
    """The text in NFC, and whether it stays."""
    text = nfc(text)
    num_chars = len(text.strip())
    return text, (EMPTY if not num_chars else SHORT if num_chars < min_chars else OK)


def clean_chat(chat: list[Message]) -> tuple[list[Message], int]:
    """The messages in NFC; a chat whose assistant says nothing is empty. Answers may be short: no `min_chars` here."""
    chat = [{**message, "content": nfc(message["content"])} for message in chat]
    says = any(message["content"].strip() for message in chat if message["role"] == "assistant")
    return chat, (OK if says else EMPTY)


def nfc(text: str) -> str:
    """Unicode normal form C; ASCII, and what is in that form, is returned as it is."""
    return text if text.isascii() or unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)
