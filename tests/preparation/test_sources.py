"""Formats, and the errors of bad input: each names file and line, and leaves no half-made stage."""

from __future__ import annotations

import csv
import errno
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from datasets import Dataset
from tokenizers import Tokenizer

from tasks.dataset_card import strays
from tasks.errors import EXIT_USER_ERROR
from tasks.preparation import corpus, readers
from tests.preparation.conftest import Stage, make_tokenizer, source, write_lines

TEXTS = [
    f'A document about the ratio of bank {i}, with a comma, a "quote"\nand a second line. \u00e9' for i in range(30)
]


def write_format(folder: Path, suffix: str) -> list[Path]:
    """The same texts in any format."""
    path = folder / f"texts{suffix}"
    records = [{"text": text, "other": i} for i, text in enumerate(TEXTS)]
    if suffix == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(records), path)
    elif suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["text", "other"])
            writer.writeheader()
            writer.writerows(records)
    elif suffix == ".json":
        path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    elif suffix in (".txt", ".md"):
        for i, text in enumerate(TEXTS):
            (folder / f"{i:02}{suffix}").write_text(text, encoding="utf-8")
        return sorted(folder.glob(f"*{suffix}"))
    else:
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return [path]


def compress(paths: list[Path], suffix: str) -> list[Path]:
    compressed = []
    for path in paths:
        data = path.read_bytes()
        compressed.append(path.with_name(path.name + suffix))
        compressed[-1].write_bytes(gzip.compress(data) if suffix == ".gz" else zstandard.compress(data))
    return compressed


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".txt", ".md"])
def test_every_format_gives_the_same_documents(stage: Stage, tmp_path: Path, suffix: str, compression: str) -> None:
    if suffix == ".parquet" and compression:
        pytest.skip("parquet compresses its own columns")
    paths = write_format(tmp_path, suffix)
    paths = compress(paths, compression) if compression else paths
    ledger = json.loads((stage({"a": source(paths)}) / "ledger.json").read_text())
    reference = json.loads(
        (stage({"a": source(write_format(tmp_path, ".jsonl"))}, runs="r2") / "ledger.json").read_text()
    )
    assert ledger["total"] == reference["total"]
    assert ledger["total"]["kept"]["documents"] == len(TEXTS)


def test_an_ending_may_stand_in_capitals(stage: Stage, tmp_path: Path) -> None:
    [path] = compress(write_format(tmp_path, ".jsonl"), ".gz")
    path = path.rename(tmp_path / "A.JSONL.GZ")
    ledger = json.loads((stage({"a": source(path)}) / "ledger.json").read_text())
    assert ledger["total"]["kept"]["documents"] == len(TEXTS)


def test_json_may_be_objects_one_after_another_larger_than_the_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "READ_BYTES", 7)
    path = tmp_path / "a.json"
    path.write_text("\n\n".join(json.dumps({"text": "\u00e9" * i}, ensure_ascii=False, indent=1) for i in range(20)))
    records = [record for (_, record), _ in readers.read_records(str(path), "json", ["text"])]
    assert [len(record["text"]) for record in records] == list(range(20))


def test_arrays_one_after_another_are_read_to_the_last(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"},\n{"text": "b"}]\n[{"text": "c"}] []\n{"text": "d"}\n')
    records = [located for located, _ in readers.read_records(str(path), "json", ["text"])]
    assert records == [(1, {"text": "a"}), (2, {"text": "b"}), (3, {"text": "c"}), (4, {"text": "d"})]


def test_compressed_files_may_hold_several_frames(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"".join(zstandard.compress(GOOD_TEXT + b"\n") for _ in range(50)))
    lines = b"".join(block for _, block, _ in readers.read_lines(str(path), 64))
    assert lines == (GOOD_TEXT + b"\n") * 50


def test_a_byte_order_mark_is_dropped(stage: Stage, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert json.loads((stage({"a": source(path)}) / "ledger.json").read_text())["total"]["read"]["documents"] == 30


def test_a_hub_dataset_streams_through_datasets(stage: Stage, tmp_path: Path) -> None:
    """A local folder stands in for the hub: `load_dataset` takes either."""
    folder = tmp_path / "hub"
    folder.mkdir()
    Dataset.from_dict({"text": TEXTS}).to_parquet(folder / "train.parquet")
    hub = {"spec": {"hf": {"id": str(folder)}, "text": "text"},
           "hf": {"id": str(folder), "subset": None, "split": "train", "revision": None}}  # fmt: skip
    assert json.loads((stage({"a": hub}) / "ledger.json").read_text())["total"]["kept"]["documents"] == len(TEXTS)


def test_a_hub_datasets_card_names_no_file_of_this_machine(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    write_lines(tmp_path / "secret.jsonl", [{"text": text} for text in TEXTS])
    card = f"---\nconfigs:\n- config_name: default\n  data_files: {tmp_path}/secret.jsonl\n---\n"
    (tmp_path / "hub/README.md").write_text(card)
    hub = {"spec": {"hf": {"id": str(tmp_path / "hub")}, "text": "text"}, "hf": {"id": str(tmp_path / "hub")}}
    text = (stage({"a": hub}, exit_code=EXIT_USER_ERROR) / "error.txt").read_text()
    assert f"names a file of this machine: {tmp_path}/secret.jsonl" in text and "sources.a.hf" in text


def test_files_of_a_hub_dataset_are_told_from_those_of_this_machine() -> None:
    own = [
        "hf://datasets/a/b@c0ffee/train.parquet",
        "https://a.org/b.jsonl",
        "zip://a.jsonl::hf://datasets/a/b@1/a.zip",
    ]
    others = [
        "/outside/a.jsonl",
        "file:///outside/a.jsonl",
        "local://a.jsonl",
        "zip://a.jsonl::/outside/a.zip",
        "a.jsonl",
    ]
    assert strays([*own, *others], "a/b") == others


def test_a_hub_dataset_that_cannot_be_opened_is_an_error(stage: Stage, tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    hub = {"spec": {"hf": {"id": gone}, "text": "text"}, "hf": {"id": gone, "split": "train"}}
    text = (stage({"a": hub}, exit_code=EXIT_USER_ERROR) / "error.txt").read_text()
    assert f"the hub dataset {gone}:train cannot be opened" in text
    assert "sources.a.hf" in text


ANSWERED = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": "An answer."}]
GOOD_TEXT = json.dumps({"text": TEXTS[0]}).encode()
GOOD_CHAT = json.dumps({"m": ANSWERED}).encode()


def chat_line(*roles: str, content: Any = "Some words.") -> bytes:
    return json.dumps({"m": [{"role": role, "content": content} for role in roles]}).encode()


BAD_LINES = {
    "malformed": (GOOD_TEXT, b'{"text": "cut of', {"text": "text"}, "malformed JSON"),
    "wrong encoding": (GOOD_TEXT, '{"text": "\u00e9tat and more of it"}'.encode("cp1252"), {"text": "text"}, "not UTF-8"),
    "missing field": (GOOD_TEXT, b'{"txt": "some text"}', {"text": "text"}, "'text' is missing, did you mean 'txt'?"),
    "number for a text": (GOOD_TEXT, b'{"text": 7}', {"text": "text"}, "holds a number (7)"),
    "null for a text": (GOOD_TEXT, b'{"text": null}', {"text": "text"}, "holds null"),
    "null has a remedy": (GOOD_TEXT, b'{"text": null}', {"text": "text"}, "correct the record, or remove it"),
    "image for content": (GOOD_CHAT, chat_line("user", "assistant", content=[{"type": "image_url"}]), {"messages": "m"},
                          "a part of type 'image_url'"),
    "input misspelt": (b'{"i": "a", "note": "", "o": "b"}', b'{"i": "a", "notes": "x", "o": "b"}',
                       {"instruction": "i", "input": "note", "output": "o"}, "'note' is missing, did you mean 'notes'"),
    "array for a record": (GOOD_TEXT, b'["text"]', {"text": "text"}, "the line holds a list"),
    "lone surrogate": (GOOD_TEXT, b'{"text": "\\ud800 and so on and on"}', {"text": "text"}, "malformed JSON"),
    "no assistant": (GOOD_CHAT, chat_line("system", "user"), {"messages": "m"}, "no assistant turn"),
    "no turns": (GOOD_CHAT, chat_line(), {"messages": "m"}, "no assistant turn"),
    "assistant first": (GOOD_CHAT, chat_line("assistant", "user", "assistant"), {"messages": "m"}, "roles out of order"),
    "two users": (GOOD_CHAT, chat_line("user", "user", "assistant"), {"messages": "m"}, "roles out of order"),
    "late system": (GOOD_CHAT, chat_line("user", "assistant", "system"), {"messages": "m"}, "roles out of order"),
    "ends with user": (GOOD_CHAT, chat_line("user", "assistant", "user"), {"messages": "m"}, "ends with 'user'"),
    "unknown role": (GOOD_CHAT, chat_line("user", "bot", "assistant"), {"messages": "m"}, "role 'bot'"),
    "list for content": (GOOD_CHAT, chat_line("user", "assistant", content=["a"]), {"messages": "m"}, "holds a list"),
    "text for turns": (GOOD_CHAT, b'{"m": "hello"}', {"messages": "m"}, "holds a text (hello)"),
    "sharegpt role": (b'{"c": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}',
                      b'{"c": [{"from": "narrator", "value": "a"}]}', {"conversations": "c"}, "'from' is 'narrator'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_an_error_that_names_file_and_line(stage: Stage, tmp_path: Path, case: str) -> None:
    good, bad, fields, message = BAD_LINES[case]
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join([good, b"", good, bad, good]) + b"\n")
    directory = stage({"a": source(path, **fields)}, exit_code=EXIT_USER_ERROR)
    text = (directory / "error.txt").read_text()
    assert message in text
    assert f"{path}:4" in text
    assert_nothing_left(directory)


@pytest.mark.parametrize(("name", "content", "message", "line"), [
    ("a.json", b'[{"text": "one text here"},\n{"text": oops}]', "malformed JSON", 2),
    ("a.json", b'[{"text": "one text here"},\n', "never closed", 2),
    ("a.json", b'[{"text": "one text here"}]\n{"text": "another one here"}\n]', "found ']' where", 3),
    ("a.json", b'{"text": "one text here"}\n]\n{"text": "another one here"}', "found ']' where", 2),
    ("a.json", b'[{"text": "one text here"},\n[{"text": "another one here"}]]', "found '[' where", 2),
    ("a.json", b'[{"text": "one text here"}]\nand more of it', "found 'a' where", 2),
    ("a.json", b'"only a string"', "found '\"' where a record should start", 1),
    ("a.csv", b'text,b\n"quoted\nfield",2\nonly one\n', "1 columns, the header has 2", 4),
    ("a.csv", b'text,b\nsome text,\xff\n', "not UTF-8", 2),
    ("a.csv", b'id;text\n1;some text\n', "separated by ';'", 1),
    ("a.jsonl", GOOD_TEXT.decode().encode("utf-16"), "iconv -f UTF-16 -t", 1),
    ("a.csv", b'other,b\nsome text,2\n', "'text' is missing", 2),
    ("a.txt", b"line one\nline \xe9 two", "not UTF-8", 2),
    ("a.jsonl.gz", gzip.compress(GOOD_TEXT * 100)[:60], "damaged", None),
    ("a.jsonl.zst", b"no zstandard at all", "damaged", None),
    ("a.jsonl.zst", zstandard.compress(GOOD_TEXT * 100)[:-9], "damaged", None),
    ("a.parquet", b"no parquet at all", "not readable as Parquet", None),
    ("a.docx", b"", "unknown file format '.docx'", None),
])  # fmt: skip
def test_a_bad_file_is_an_error(
    stage: Stage, tmp_path: Path, name: str, content: bytes, message: str, line: int | None
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    directory = stage({"a": source(path)}, exit_code=EXIT_USER_ERROR)
    text = (directory / "error.txt").read_text()
    assert message in text
    assert (f"{path}:{line}" if line else str(path)) in text
    assert_nothing_left(directory)


@pytest.mark.parametrize(("windows", "processes"), [(1, 1), (3, 1), (3, 2)])
def test_windows_line_ends_are_said_and_stay(
    stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    windows: int, processes: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(corpus, "POOL_FROM_BYTES", 0)
    ends = ["\r\n"] * windows + ["\n"] * 2
    paths = [tmp_path / f"{i}.txt" for i in range(len(ends) + 1)]
    for path, end in zip(paths, [*ends, "\r\n"], strict=True):  # the last is too short to be kept
        path.write_bytes(f"{path.name} holds capital{end}".encode() * (9 if path != paths[-1] else 0) + end.encode())
    directory = stage({"docs": source(paths)}, processes=processes)
    said = "docs: 3 of 5 documents hold Windows line ends (\\r\\n), trained on as they are"
    assert (said in capsys.readouterr().out) == (windows == 3)
    with pa.memory_map(str(directory / "rows.arrow")) as file:
        ids = [id for row in pa.ipc.open_stream(file).read_all().to_pylist() for id in row["input_ids"]]
    text = Tokenizer.from_file(str(directory / "tokenizer" / "tokenizer.json")).decode(ids)
    assert (text.count("\r\n"), text.count("\r")) == (10 * windows, 10 * windows)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "hub"])
@pytest.mark.parametrize(("mapped", "message"), [
    ("inptu", "'inptu' is missing, did you mean 'input'"), ("context", "no record of the source 'a' has the field 'context'"),
])  # fmt: skip
def test_an_input_that_no_record_has_is_told_with_the_fields_there_are(
    stage: Stage, tmp_path: Path, kind: str, mapped: str, message: str
) -> None:
    records = [
        {"instruction": f"Judge bank {i}.", "input": f"Its ratio is {i}.", "output": f"Open: {i}"} for i in range(9)
    ]
    path = tmp_path / f"{'train.parquet' if kind == 'hub' else 'a.' + kind}"
    if kind in ("parquet", "hub"):
        pa.parquet.write_table(pa.Table.from_pylist(records), path)
    elif kind == "csv":
        path.write_text("\n".join(",".join(row) for row in [records[0], *(one.values() for one in records)]))
    else:
        path.write_text("\n".join(json.dumps(record) for record in records))
    spec = {"instruction": "instruction", "input": mapped, "output": "output"}
    hub = {"id": str(tmp_path)}
    given = {"spec": {"hf": hub, **spec}, "hf": hub} if kind == "hub" else source(path, **spec)
    text = (stage({"a": given}, exit_code=EXIT_USER_ERROR) / "error.txt").read_text()
    assert message in text and "record: instruction, input, output" in text


@pytest.mark.parametrize(("content", "message"), [
    (b"", "holds no record"),
    (b"\n\n", "holds no record"),
    (b'{"text": "  "}\n{"text": "short"}\n', "all 2 records are empty or short"),
])  # fmt: skip
def test_an_empty_source_is_an_error(stage: Stage, tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    directory = stage({"a": source(path)}, exit_code=EXIT_USER_ERROR)
    assert message in (directory / "error.txt").read_text()
    assert_nothing_left(directory)


def test_a_file_that_changed_since_the_plan_is_an_error(stage: Stage, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    planned = source(path)
    path.write_bytes(path.read_bytes() * 2)
    assert "when this run was planned" in (stage({"a": planned}, exit_code=EXIT_USER_ERROR) / "error.txt").read_text()
    path.unlink()
    assert "no such file" in (stage({"a": planned}, exit_code=EXIT_USER_ERROR) / "error.txt").read_text()


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("harm", ["deleted", "cut off"])
def test_a_file_that_is_harmed_while_we_read_is_told_as_changed(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str, processes: int
) -> None:
    first, second = (write_lines(tmp_path / f"{n}.jsonl", [{"text": text} for text in TEXTS]) for n in "ab")
    read = readers.read_lines

    def read_and_harm(path: str, block_bytes: int) -> Iterator[tuple[int, bytes, int]]:
        yield from read(path, block_bytes)
        if path == str(first):  # the other one stood when the reading began
            second.unlink() if harm == "deleted" else second.write_bytes(second.read_bytes()[:-20])

    monkeypatch.setattr(readers, "read_lines", read_and_harm)
    monkeypatch.setattr(corpus, "POOL_FROM_BYTES", 0)
    directory = stage({"a": source([first, second])}, processes=processes, exit_code=EXIT_USER_ERROR)
    said = (directory / "error.txt").read_text()
    assert str(second) in said and "changed after this run was planned" in said and "sources.a.files" in said
    assert_nothing_left(directory)


def test_a_damaged_page_of_a_parquet_file_is_told_with_its_file(stage: Stage, tmp_path: Path) -> None:
    [path] = write_format(tmp_path, ".parquet")
    content = bytearray(path.read_bytes())
    content[40:200] = bytes(160)  # the first column's texts; what describes them stands at the end
    path.write_bytes(content)
    directory = stage({"a": source(path)}, exit_code=EXIT_USER_ERROR)
    said = (directory / "error.txt").read_text()
    assert "not readable as Parquet" in said and str(path) in said
    assert_nothing_left(directory)


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".jsonl"])
def test_a_file_on_a_disk_that_fails_is_told_with_its_name(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    path = write_format(tmp_path, suffix)[0]
    compressed = compress([path], ".gz")[0]

    class Failing(gzip.GzipFile):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

        readline = read  # type: ignore[assignment]

    monkeypatch.setattr(readers, "_open_gzip", lambda raw: Failing(fileobj=raw))
    said = (stage({"a": source(compressed)}, exit_code=EXIT_USER_ERROR) / "error.txt").read_text()
    assert "the file cannot be read: Input/output error" in said and str(compressed) in said


def test_chats_in_a_text_file_are_refused(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    directory = stage({"a": source(tmp_path / "a.txt", messages="m")}, exit_code=EXIT_USER_ERROR)
    assert "one document, not conversations" in (directory / "error.txt").read_text()


@pytest.mark.parametrize(("what", "eos", "message"), [
    ({}, None, "names no EOS token"),
    ({}, "<|gone|>", "'<|gone|>', which is not in its vocabulary"),
    ({"vocab_size": 100}, "<|endoftext|>", "tokenizer and model differ in vocabulary"),
    ({"vocab_size": 32_000}, "<|endoftext|>", "tokenizer and model differ in vocabulary"),
    ({"max_positions": 128}, "<|endoftext|>", "seq_len is 256, the model has 128 positions"),
])  # fmt: skip
def test_a_tokenizer_that_does_not_fit_is_an_error(
    stage: Stage, tmp_path: Path, what: dict[str, Any], eos: str | None, message: str
) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    make_tokenizer(tmp_path / "model", eos=eos)
    directory = stage({"a": source(path)}, model=tmp_path / "model", exit_code=EXIT_USER_ERROR, **what)
    assert message in (directory / "error.txt").read_text()
    assert_nothing_left(directory)


def test_a_model_without_a_tokenizer_is_an_error(stage: Stage, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    (tmp_path / "model").mkdir()
    directory = stage({"a": source(path)}, model=tmp_path / "model", exit_code=EXIT_USER_ERROR)
    assert "no tokenizer can be loaded" in (directory / "error.txt").read_text()
    assert_nothing_left(directory)


def assert_nothing_left(directory: Path) -> None:
    assert sorted(path.name for path in directory.iterdir()) == ["error.txt", "order.json"]
