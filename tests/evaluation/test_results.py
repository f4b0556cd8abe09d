"""What becomes of lm-eval's answer."""

from __future__ import annotations

import json
from pathlib import Path

from tasks.evaluation.results import plain, sample_lines, summarize, write_results


def logged(doc_id: int, filter_name: str, value: object) -> dict:
    return {
        "doc_id": doc_id, "arguments": [("a prompt", {"until": ["x"]})], "target": "t", "filter": filter_name,
        "filtered_resps": ["r"], "metrics": ["match"], "match": value,
    }  # fmt: skip


def test_standard_errors_and_names_are_no_metrics() -> None:
    raw = {
        "results": {"t": {"name": "t", "alias": "t", "sample_len": 3, "match,strict": 0.0, "match,loose": 0.5,
                          "match_stderr,strict": "N/A", "acc,none": 1.0}},
        "higher_is_better": {"t": {"match": True}},
        "n-samples": {"t": {"original": 9, "effective": 3}},
    }  # fmt: skip
    results = summarize(raw, {"t": "suite"})
    assert results["tasks"] == {"t": {"match,strict": 0.0, "match,loose": 0.5, "acc": 1.0}}
    assert results["higher_is_better"]["t"] == {"match,strict": True, "match,loose": True, "acc": None}
    assert results["n"] == {"t": 3} and results["asked"] == {"t": "suite"}


def test_filters_of_one_document_share_a_line() -> None:
    lines = sample_lines([logged(1, "strict", 0.0), logged(0, "strict", 1.0), logged(1, "loose", 1.0)])
    assert [line["doc_id"] for line in lines] == [0, 1]
    assert lines[1]["metrics"] == {"match,strict": 0.0, "match,loose": 1.0}


def test_anything_becomes_plain_json() -> None:
    import numpy as np

    value = {"a": (1, float("nan"), np.float32(0.5)), 2: {"c", "b"}, "n": np.int64(3), "o": object}
    assert json.loads(json.dumps(plain(value), allow_nan=False)) == {
        "a": [1, None, 0.5], "2": ["b", "c"], "n": 3, "o": "<class 'object'>",
    }  # fmt: skip


def test_what_a_killed_run_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "old.jsonl").write_text("{}\n")
    write_results(tmp_path, {"tasks": {}}, {"a/b": [logged(0, "none", 1.0)]})
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["a_b.jsonl"]
