"""The worker as a whole: cleaning, duplicates, ledger, bytes that depend on nothing but the order, kills and locks."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer

from tasks.preparation import corpus, dedup, ledger, sources, spill
from tasks.preparation.__main__ import main
from tasks.stage import is_done, read_artifact, read_order, stage_lock, write_order
from tests.preparation.conftest import Stage, make_chats, make_documents, source, write_lines

OUTPUTS = ("rows.arrow", "ledger.json", "mix.json", "examples.json", "tokenizer/tokenizer.json")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def test_rows_are_as_the_trainer_expects(stage: Stage, tmp_path: Path) -> None:
    a, c = make_documents(tmp_path / "a.jsonl", 400), make_chats(tmp_path / "c.jsonl", 200)
    directory = stage({"a": source(a), "c": source(c, messages="messages")})
    rows = datasets.Dataset.from_file(str(directory / "rows.arrow"))
    counts = read_artifact(directory)["counts"]
    assert len(rows) == counts["rows"] > 50
    lengths = [len(row["input_ids"]) for row in rows]
    assert max(lengths) <= 256
    assert sum(lengths) == counts["tokens"]
    assert counts["fill"] == pytest.approx(sum(lengths) / len(rows) / 256)
    for row in rows:
        assert sum(row["seq_lengths"]) == len(row["input_ids"]) == len(row["labels"])
        assert len(row["seq_sources"]) == len(row["seq_lengths"])
        for i, (token, label) in enumerate(zip(row["input_ids"], row["labels"], strict=True)):
            assert label in (token, -100)
            assert not (label != -100 and i in np.cumsum([0, *row["seq_lengths"]]))  # nothing predicts a first token
    assert any(len(set(row["seq_sources"])) > 1 for row in rows)  # documents and chats share rows
    assert sum(label != -100 for row in rows for label in row["labels"]) == counts["supervised_tokens"]
    assert [str(field.type) for field in rows.data.schema] == ["list<item: int32>"] * 3 + ["list<item: int16>"]


def test_every_token_of_a_document_is_in_the_rows_once(stage: Stage, tmp_path: Path) -> None:
    path = make_documents(tmp_path / "a.jsonl", 200, mean_words=150)
    directory = stage({"a": source(path)})
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer" / "tokenizer.json"))
    wanted: dict[int, int] = {}
    for line in path.read_text().splitlines():
        for token in [*tokenizer.encode(json.loads(line)["text"]).ids, tokenizer.token_to_id("<|endoftext|>")]:
            wanted[token] = wanted.get(token, 0) + 1
    with pa.memory_map(str(directory / "rows.arrow")) as file:
        ids = pa.ipc.open_stream(file).read_all()["input_ids"].combine_chunks().flatten().to_numpy()
    assert dict(enumerate(np.bincount(ids).tolist())) == {**dict.fromkeys(range(ids.max() + 1), 0), **wanted}
    split = read_json(directory / "ledger.json")["sources"]["a"]["split"]
    assert split["documents"] > 20
    assert split["pieces"] > split["documents"]


def test_cleaning_normalizes_and_counts_what_it_drops(stage: Stage, tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "Crédit réel et dépôt à vue")
    a = write_lines(tmp_path / "a.jsonl", [
        {"text": "the first document of bank a"}, {"text": ""}, {"text": " \n "}, {"text": "too short"},
        {"text": "the first document of bank a"}, {"text": decomposed}, {"text": "the same in two sources"},
    ])  # fmt: skip
    b = write_lines(tmp_path / "b.jsonl", [
        {"text": unicodedata.normalize("NFC", decomposed)}, {"text": "the same in two sources"}, {"text": "only in b, not in a"},
    ])  # fmt: skip
    directory = stage({"b": source(b), "a": source(a)}, tokens=30, mix={"b": 1.0}, replay={"a": 0.3})
    lines = read_json(directory / "ledger.json")["sources"]
    assert list(lines) == ["b", "a"]  # mix comes first, so it keeps its copies
    assert lines["b"]["kept"]["documents"] == 3
    assert lines["a"]["duplicate"]["documents"] == 3
    assert {reason: pair["documents"] for reason, pair in lines["a"]["dropped"].items()} == {"empty": 2, "short": 1}
    assert lines["a"]["examples"] == {
        "empty": f"{a}:2", "short": f"{a}:4", "duplicate": f"{a}:5 (first at {a}:1)",
    }  # fmt: skip
    assert lines["a"]["kept"]["documents"] == 1


def test_a_source_that_repeats_another_entirely_is_an_error(stage: Stage, tmp_path: Path) -> None:
    path = make_documents(tmp_path / "a.jsonl", 20)
    directory = stage({"a": source(path), "b": source(path)}, exit_code=2)
    assert "all of it is a duplicate" in (directory / "error.txt").read_text()


def test_duplicates_are_found_across_buckets_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    index = np.zeros(3000, dtype=spill.DOCUMENT)
    index["hash"] = rng.integers(0, 2**63, (1000, 2), dtype=np.uint64)[rng.integers(0, 1000, 3000)]
    index["source"] = np.arange(3000) // 1000
    parted = index.copy()
    examples = dedup.mark_duplicates(index)
    monkeypatch.setattr(dedup, "BUCKET_DOCUMENTS", 100)
    assert dedup.mark_duplicates(parted) == examples
    assert (parted["status"] == index["status"]).all()
    first_seen = np.unique(index["hash"], axis=0, return_index=True)[1]
    assert sorted(np.flatnonzero(index["status"] == 0)) == sorted(first_seen)
    assert 500 < len(first_seen) < 1000


def test_output_is_the_same_bytes_for_any_number_of_processes(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for any size of a block, so that several blocks meet in the pool."""
    a, b = make_documents(tmp_path / "a.jsonl", 500), make_documents(tmp_path / "b.jsonl", 300, seed=1)
    c = make_chats(tmp_path / "c.jsonl", 200)
    given = {"a": source(a), "b": source(b), "c": source(c, messages="messages")}
    what = {"mix": {"a": 0.6, "c": 0.4}, "replay": {"b": 0.1}, "epochs": 1.3}
    alone = stage(given, runs="alone", **what)
    monkeypatch.setattr(sources, "BLOCK_BYTES", 10_000)
    monkeypatch.setattr(corpus, "POOL_FROM_BYTES", 0)
    blocks = list(sources.read_blocks(sources.plan_sources(read_order(alone).what)))
    assert len(blocks) > 20
    pooled = stage(given, processes=3, runs="pool", **what)
    for output in OUTPUTS:
        assert (pooled / output).read_bytes() == (alone / output).read_bytes(), output
    assert read_artifact(alone)["counts"]["epochs"]["c"] > 1  # repeats were met


def test_an_error_in_the_pool_is_the_first_in_reading_order(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(corpus, "POOL_FROM_BYTES", 0)
    records: list[Any] = [{"text": f"a document with number {i}"} for i in range(400)]
    records[150], records[350] = {"txt": 1}, {"txt": 2}
    path = write_lines(tmp_path / "a.jsonl", records)
    directory = stage({"a": source(path)}, processes=2, exit_code=2)
    assert f"{path}:151" in (directory / "error.txt").read_text()


def test_the_seed_changes_the_rows_and_not_the_ledger(stage: Stage, tmp_path: Path) -> None:
    path = make_documents(tmp_path / "a.jsonl", 300)
    one, two = (stage({"a": source(path)}, seed=seed) for seed in (0, 1))
    assert one != two
    assert (one / "rows.arrow").read_bytes() != (two / "rows.arrow").read_bytes()
    first, second = (read_json(directory / "ledger.json")["total"] for directory in (one, two))
    assert first["packed"]["tokens"] == second["packed"]["tokens"]


def test_shares_are_held_and_written_down(stage: Stage, tmp_path: Path) -> None:
    a, b = make_documents(tmp_path / "a.jsonl", 2000), make_documents(tmp_path / "b.jsonl", 500, seed=1)
    c = make_chats(tmp_path / "c.jsonl", 500)
    given = {"a": source(a), "b": source(b), "c": source(c, messages="messages")}
    directory = stage(given, mix={"a": 0.7, "c": 0.3}, replay={"b": 0.12}, tokens=160_000)
    mixed = read_json(directory / "mix.json")
    for name, asked in {"a": 0.7 * 0.88, "c": 0.3 * 0.88, "b": 0.12}.items():
        assert mixed["sources"][name]["asked"] == pytest.approx(asked)
        assert abs(mixed["sources"][name]["achieved"] - asked) <= 0.001
        assert mixed["windows"]["largest_deviation"][name] <= 0.02
    assert sum(entry["tokens"] for entry in mixed["sources"].values()) == pytest.approx(160_000, rel=1e-3)
    assert len(mixed["windows"]["first_rows"]) == len(mixed["windows"]["shares"]["a"]) == 100


def test_repeats_of_a_document_never_share_a_row(stage: Stage, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": f"document number {i} of the bank"} for i in range(200)])
    directory = stage({"a": source(path)}, epochs=3.5)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer" / "tokenizer.json"))
    seen = 0
    for row in datasets.Dataset.from_file(str(directory / "rows.arrow")):
        ends = np.cumsum(row["seq_lengths"])
        texts = [tokenizer.decode(row["input_ids"][e - n : e]) for e, n in zip(ends, row["seq_lengths"], strict=True)]
        assert len(set(texts)) == len(texts)
        seen += len(texts)
    assert seen >= 700


def test_a_ledger_that_does_not_balance_fails_the_stage(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_documents(tmp_path / "a.jsonl", 50)
    write_rows = main.__globals__["write_rows"]

    def lose_a_row(out: Path, ids: np.ndarray, layout: Any, *rest: Any) -> Any:
        kept = layout.row < layout.row[-1]
        return write_rows(out, ids, type(layout)(*(getattr(layout, name)[kept] for name in vars(layout))), *rest)

    monkeypatch.setitem(main.__globals__, "write_rows", lose_a_row)
    with pytest.raises(RuntimeError, match=r"does not balance: source 'a', packed tokens: .* difference -\d+"):
        stage({"a": source(path)})
    [directory] = (tmp_path / "runs").glob("prepare_cpt-*")
    assert [file.name for file in directory.iterdir()] == ["order.json"]
    assert ledger.balance is main.__globals__["balance"]


def test_the_ledger_adds_up_over_all_sources(stage: Stage, tmp_path: Path) -> None:
    a, c = make_documents(tmp_path / "a.jsonl", 100), make_chats(tmp_path / "c.jsonl", 80)
    directory = stage({"a": source(a), "c": source(c, messages="messages")}, epochs=1.7)
    found = read_json(directory / "ledger.json")
    assert found["balanced"] is True
    for line in ("read", "kept", "unused", "repeated", "packed", "supervised"):
        for unit, value in found["total"][line].items():
            assert value == sum(source[line][unit] for source in found["sources"].values())
    assert found["total"]["repeated"]["tokens"] > 0
    assert found["total"]["packed"]["tokens"] == read_artifact(directory)["counts"]["tokens"]


@pytest.mark.parametrize("seed", range(12))
def test_any_mix_balances(stage: Stage, tmp_path: Path, seed: int) -> None:
    """Random sources with duplicates, empty and too long records, random shares, budgets, row lengths."""
    rng = np.random.default_rng(seed)
    given, names = {}, ["a", "b", "c", "d"][: int(rng.integers(1, 5))]
    for name in names:
        make = make_chats if rng.random() < 0.4 else make_documents
        path = make(tmp_path / f"{name}.jsonl", int(rng.integers(150, 400)), seed=int(rng.integers(0, 3)))
        lines = path.read_text().splitlines()
        lines += [lines[i] for i in rng.integers(0, len(lines), 20)]
        lines += ['{"text": ""}', '{"text": "short"}'] if make is make_documents else []
        path.write_text("\n".join(lines))
        given[name] = source(path, **({"messages": "messages"} if make is make_chats else {"text": "text"}))
    replay = {names[-1]: float(rng.uniform(0.02, 0.2))} if len(names) > 1 else {}
    mixed = names[: len(names) - len(replay)]
    mix = {name: float(share) for name, share in zip(mixed, rng.dirichlet([20] * len(mixed)), strict=True)}
    what = {"mix": mix, "replay": replay, "overflow": str(rng.choice(["drop", "truncate"])), "seed": seed,
            "seq_len": int(rng.choice([64, 150, 256])), "epochs": float(rng.uniform(0.7, 2.5)),
            "max_epochs": {"mix": 9, "replay": 9}}  # fmt: skip
    directory = stage(given, **what)
    total = read_json(directory / "ledger.json")["total"]
    assert total["duplicate"]["documents"] > 0
    assert total["packed"]["tokens"] == read_artifact(directory)["counts"]["tokens"] > 0


def test_examples_show_what_is_trained_on(stage: Stage, tmp_path: Path) -> None:
    c = make_chats(tmp_path / "c.jsonl", 20)
    directory = stage({"c": source(c, messages="messages")})
    example = read_json(directory / "examples.json")["c"][0]
    assert example["where"].startswith(f"{c}:")
    assert example["pieces"][0]["text"].startswith("<|im_start|>user\n")
    assert [piece["trained"] for piece in example["pieces"][:2]] == [False, True]
    assert example["pieces"][1]["text"].endswith("<|im_end|>")


def run_worker(directory: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tasks.preparation", str(directory)], stdout=subprocess.PIPE, text=True
    )


def test_a_killed_worker_leaves_nothing_behind_and_starts_over(stage: Stage, tmp_path: Path) -> None:
    path = make_documents(tmp_path / "a.jsonl", 10_500)  # above POOL_FROM_BYTES: a pool works on it
    assert path.stat().st_size > corpus.POOL_FROM_BYTES
    small = stage({"a": source(make_documents(tmp_path / "small.jsonl", 10))})
    order = read_order(small)
    what = {**order.what, "sources": {"a": source(path)}}
    directory = write_order(
        type(order)(order.stage, order.kind, order.run, what, {"processes": 2}, order.inputs), tmp_path
    )
    process = run_worker(directory)
    assert process.stdout is not None
    while "read MB" not in process.stdout.readline():
        assert process.poll() is None
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(children) >= 2
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while any(_is_alive(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_is_alive(pid) for pid in children)
    assert (directory / "work").is_dir()
    assert not is_done(directory)
    again = run_worker(directory)
    output = again.communicate()[0]
    assert again.returncode == 0, output
    for what in ("read MB", "row"):
        assert re.search(rf"{what} ([\d,]+)/\1  100%  .*\b[1-9][\d,]* tok/s  ETA 0:00", output), output
    assert is_done(directory)
    assert not (directory / "work").exists()
    assert main(directory) == 0  # done: nothing is computed twice


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_second_worker_waits_for_the_first(stage: Stage, tmp_path: Path) -> None:
    directory = stage({"a": source(make_documents(tmp_path / "a.jsonl", 10))})
    (directory / "artifact.json").unlink()
    with stage_lock(directory, on_wait=lambda _: None):
        second = run_worker(directory)
        assert second.stdout is not None
        assert f"waits for process {os.getpid()}" in second.stdout.readline()
    second.communicate()
    assert second.returncode == 0
    assert is_done(directory)


def test_peak_memory_does_not_grow_with_the_corpus(stage: Stage, tmp_path: Path) -> None:
    """Four times the text. `make benchmark` measures it at 64 MB; a test has room for a few."""
    order = read_order(stage({"a": source(make_documents(tmp_path / "small.jsonl", 10))}))
    peaks = []
    for number in (4_000, 16_000):
        path = make_documents(tmp_path / f"{number}.jsonl", number)
        what = {**order.what, "sources": {"a": source(path)}}
        directory = write_order(
            type(order)(order.stage, order.kind, order.run, what, {"processes": 1}, order.inputs), tmp_path
        )
        code = ("import resource, sys; from pathlib import Path; from tasks.preparation.__main__ import main; "
                "main(Path(sys.argv[1])); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")  # fmt: skip
        output = subprocess.run(
            [sys.executable, "-c", code, str(directory)], capture_output=True, text=True, check=True
        )
        peaks.append(int(output.stdout.split()[-1]))
    assert peaks[1] <= 1.15 * peaks[0], peaks
