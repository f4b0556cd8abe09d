"""Readers: one file format each, as a stream with line numbers. A record is `(line, dict)`.

.jsonl is cut into blocks of whole lines and parsed later; .json is arrays or objects one after another; .csv has a
header; .parquet counts rows instead of lines; .txt and .md are one document a file. All may be .gz or .zst.
Text is UTF-8 (a byte order mark is dropped); anything else is an error that names the line.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import zstandard

from tasks.errors import UserError

Located = tuple[int, dict[str, Any]]  # line (or row), record

FORMATS = {".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text", ".md": "text"}
COMPRESSED = (".gz", ".zst")
READ_BYTES = 1 << 20
UTF8_BOM = codecs.BOM_UTF8


def file_format(path: str, is_chat: bool = False) -> str:
    """The format by the file's name. Raises `UserError` for one that we do not read."""
    name = Path(path)
    suffix = (Path(name.stem).suffix if is_compressed(path) else name.suffix).lower()
    allowed = ", ".join(FORMATS) + "; each but .parquet also with .gz or .zst"
    if suffix not in FORMATS or (suffix == ".parquet" and is_compressed(path)):
        raise UserError(f"unknown file format '{''.join(name.suffixes[-2:])}'", where=path, allowed=allowed)
    if is_chat and FORMATS[suffix] == "text":
        raise UserError("a text file holds one document, not conversations", where=path,
                        allowed=".jsonl, .json, .csv or .parquet for chats")  # fmt: skip
    return FORMATS[suffix]


def is_compressed(path: str) -> bool:
    """Whether the file's name says so."""
    return path.lower().endswith(COMPRESSED)


def read_lines(path: str, block_bytes: int) -> Iterator[tuple[int, bytes, int]]:
    """Blocks of whole lines: (number of the first line, bytes, bytes of the file read so far)."""
    line, rest = 1, b""
    with open_binary(path) as (file, raw):
        while chunk := file.read(block_bytes):
            if line == 1 and not rest:
                chunk = chunk.removeprefix(UTF8_BOM)
            cut = chunk.rfind(b"\n") + 1
            if not cut:
                rest += chunk
                continue
            block, rest = rest + chunk[:cut], chunk[cut:]
            yield line, block, raw.tell()
            line += block.count(b"\n")
        if rest.strip():
            yield line, rest, raw.tell()


def read_records(path: str, kind: str, fields: list[str]) -> Iterator[tuple[Located, int]]:
    """Records of any format but .jsonl, with the bytes of the file read so far."""
    if kind == "parquet":
        yield from _read_parquet(path, fields)
        return
    with open_binary(path) as (file, raw):
        if kind == "csv":
            records = _read_csv(path, file)
        elif kind == "json":
            records = _read_json(path, file)
        else:
            records = iter([(1, {fields[0]: decode(file.read(), path, 1)})])
        for located in records:
            yield located, raw.tell()


@contextmanager
def open_binary(path: str) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The decompressed stream, and the raw file whose position tells how far we are."""
    try:
        with Path(path).open("rb") as raw:
            if not is_compressed(path):
                yield raw, raw
            else:
                yield (_open_gzip(raw) if path.lower().endswith(".gz") else _open_zstd(raw)), raw
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"the compressed file is damaged: {error}", where=path) from None
    except OSError as error:
        raise UserError(f"the file cannot be read: {error.strerror or error}", where=path) from error


def decode(data: bytes, path: str, first_line: int) -> str:
    """UTF-8 text; a wrong byte is an error that names its line."""
    try:
        return data.removeprefix(UTF8_BOM).decode("utf-8") if first_line == 1 else data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + error.object[: error.start].count(b"\n")
        raise wrong_encoding(path, line, error) from None


def wrong_encoding(path: str, line: int, error: UnicodeDecodeError) -> UserError:
    """The error for bytes that are not UTF-8."""
    wrong = error.object[error.start : error.start + 4]
    encoding = (
        "UTF-16" if line == 1 and error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "CP1252"
    )
    return UserError(f"the bytes {wrong!r} are not UTF-8 ({error.reason})", where=f"{path}:{line}", allowed="UTF-8",
                     todo=f"convert it, for example: iconv -f {encoding} -t UTF-8 {Path(path).name}")  # fmt: skip


def _open_gzip(raw: IO[bytes]) -> IO[bytes]:
    return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]


def _open_zstd(raw: IO[bytes]) -> IO[bytes]:
    return io.BufferedReader(_Zstd(raw), READ_BYTES)


class _Zstd(io.RawIOBase):
    """Decompresses frame after frame. The library's own reader takes a file that is cut off for a complete one."""

    def __init__(self, raw: IO[bytes]) -> None:
        self.raw, self.pending = raw, b""
        self.frame = zstandard.ZstdDecompressor().decompressobj()
        self.within = False

    def readable(self) -> bool:
        """For `BufferedReader`."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer; 0 at the end."""
        while not self.pending:
            data = self.frame.unused_data if self.frame.eof else b""
            if self.frame.eof:
                self.frame, self.within = zstandard.ZstdDecompressor().decompressobj(), False
            data = data or self.raw.read(READ_BYTES)
            if not data:
                if self.within:
                    raise EOFError("it ends within a frame")
                return 0
            self.within = True
            self.pending = self.frame.decompress(data)
        number = min(len(buffer), len(self.pending))
        buffer[:number], self.pending = self.pending[:number], self.pending[number:]
        return number


def _read_csv(path: str, file: IO[bytes]) -> Iterator[Located]:
    csv.field_size_limit(1 << 30)  # documents are longer than the default 128 KiB
    rows = csv.reader((decode(raw, path, line) for line, raw in enumerate(file, start=1)), strict=True)
    try:
        header = next(rows, [])
        if len(header) == 1 and ";" in header[0]:
            raise UserError("the columns seem to be separated by ';'", where=f"{path}:1", allowed="','",
                            todo="save it with commas between columns")  # fmt: skip
        line = rows.line_num + 1
        for row in rows:
            if row and len(row) != len(header):
                raise UserError(
                    f"the row has {len(row)} columns, the header has {len(header)}",
                    where=f"{path}:{line}",
                    allowed=", ".join(header),
                    todo="quote fields that hold commas or newlines",
                )
            if row:
                yield line, dict(zip(header, row, strict=True))
            line = rows.line_num + 1
    except csv.Error as error:
        raise UserError(f"not readable as CSV: {error}", where=f"{path}:{rows.line_num}") from None


def _read_parquet(path: str, fields: list[str]) -> Iterator[tuple[Located, int]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            # If one of the fields is missing, all that there are are read: the error about it names them.
            names = file.schema_arrow.names
            columns = fields if set(fields) <= set(names) else names
            size = Path(path).stat().st_size
            for batch in file.iter_batches(batch_size=256, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield (number, record), size * number // max(1, file.metadata.num_rows)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # Arrow knows no more of a damaged page
        at = f"{path}, behind row {number:,}" if number else path
        raise UserError(f"not readable as Parquet: {error}", where=at) from error


def _read_json(path: str, file: IO[bytes]) -> Iterator[Located]:
    """Arrays of objects, or objects, one after another, without holding more than one object."""
    text = _Text(path, file)
    in_array = False
    while char := text.skip(" \t\r\n,"):
        if char == "{":
            line = text.line
            yield line, text.take_object()
        elif char == ("]" if in_array else "["):
            in_array = not in_array
            text.take(1)
        else:
            raise UserError(f"found {char!r} where a record should start", where=f"{path}:{text.line}",
                            allowed="arrays of objects, or objects, one after another")  # fmt: skip
    if in_array:
        raise UserError("the array is never closed: the file seems cut off", where=f"{path}:{text.line}")


class _Text:
    """A window that slides over a file's text and knows its line."""

    def __init__(self, path: str, file: IO[bytes]) -> None:
        self.path, self.file, self.line, self.window, self.at = path, file, 1, "", 0
        self.decoder, self.lines_decoded = codecs.getincrementaldecoder("utf-8-sig")(), 1

    def fill(self) -> bool:
        """Read on; False at the end of the file."""
        data = self.file.read(max(READ_BYTES, len(self.window)))  # doubling: a huge record is not quadratic
        try:
            text = self.decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            line = self.lines_decoded + error.object[: error.start].count(b"\n")
            raise wrong_encoding(self.path, line, error) from None
        self.lines_decoded += text.count("\n")
        self.window, self.at = self.window[self.at :] + text, 0
        return bool(data)

    def skip(self, chars: str) -> str:
        """The next character that is none of `chars`; empty at the end."""
        pattern = re.compile(f"[{re.escape(chars)}]*")
        while True:
            end = pattern.match(self.window, self.at).end()  # type: ignore[union-attr]
            self.take(end - self.at)
            if self.at < len(self.window):
                return self.window[self.at]
            if not self.fill():
                return ""

    def take(self, num_chars: int) -> None:
        """Step over characters, counting lines."""
        self.line += self.window.count("\n", self.at, self.at + num_chars)
        self.at += num_chars

    def take_object(self) -> dict[str, Any]:
        """Parse one object, reading on as long as it is incomplete."""
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self.window, self.at)
            except json.JSONDecodeError as error:
                if self.fill():
                    continue
                line = self.line + self.window.count("\n", self.at, error.pos)
                raise UserError(f"malformed JSON: {error.msg}", where=f"{self.path}:{line}") from None
            self.take(end - self.at)
            return value  # type: ignore[no-any-return]
