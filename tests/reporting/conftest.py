"""A finished run on disk, shaped like the workers' outputs, whose texts try to break out of the page."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tasks.stage import Order, finish, write_json, write_order

HOSTILE = '<script>alert("x")</script>'
FENCE = "```\n# not a heading | not a cell\n```"
BACKTICKS = "`````"
METRICS = {  # task -> metric -> (base, cpt, sft), higher is better
    "violations": {"micro_f1": ((0.0, 0.0, 0.9123), True), "nothing": ((None, None, None), True)},
    "domain_bpb": {"bits_per_byte": ((5.07, 0.3182, 0.3377), False)},
    "general_bpb": {"bits_per_byte": ((0.354, 0.404, 0.3811), False)},
    "facts": {"acc": ((0.81, 0.81, 0.79), True)},
}
DOMAIN, GENERAL = ["violations", "domain_bpb"], ["general_bpb", "facts"]
HOW = {"tag": "cpu", "device": "cpu", "backend": "fsdp", "precision": "fp32", "processes": 1}


@pytest.fixture
def report_directory(tmp_path: Path) -> Path:
    """A report stage with its order, over a full run."""
    return make_run(tmp_path / "runs")


def make_run(
    runs: Path, stages: tuple[str, ...] = ("cpt", "sft"), evaluated: bool = True, gate: dict[str, float] | None = None
) -> Path:
    """Write every stage of a run; returns the report's directory."""
    made: dict[str, Path] = {}
    for name in stages:
        made[f"prepare_{name}"] = _prepare(runs, name)
    for name in stages:
        made[name] = _train(runs, name, made[f"prepare_{name}"])
    for role in ("base", *stages) if evaluated else ():
        made[f"evaluate_{role}"] = _evaluate(runs, role)
    what = {"stages": {name: path.name.split("-")[-1] for name, path in made.items()}, "gate": gate,
            "domain": DOMAIN if evaluated else [], "general": GENERAL if evaluated else []}  # fmt: skip
    order = Order("report", "report", f"regulator {HOSTILE}", what, HOW, {k: str(v) for k, v in made.items()})
    return write_order(order, runs)


def _prepare(runs: Path, name: str) -> Path:
    files = [{"path": f"data/{name}.jsonl", "bytes": 9, "sha256": "ab" * 32}]
    sources = {"laws": {"spec": {"text": "text"}, "files": files},
               "general": {"spec": {"text": "text"}, "hf": {"id": "some/data", "revision": "c0ffee"}}}  # fmt: skip
    what = {"stage": name, "sources": sources, "tokens": 400_000, "mix": {"laws": 1.0}, "replay": {"general": 0.1},
            "max_epochs": {"mix": 4, "replay": 1}, "overflow": "error"}  # fmt: skip
    directory = write_order(Order(f"prepare_{name}", "prepare", "regulator", what, HOW, {"model": "base"}), runs)
    lines = {"laws": _account(360_000), "general": _account(40_000)}
    write_json(directory / "ledger.json", {"sources": lines, "total": _account(400_000), "balanced": True})
    shares = {"laws": ("mix", 0.9, 0.90003, 360_000, 3.2), "general": ("replay", 0.1, 0.09997, 40_000, 0.5)}
    keys = ("role", "asked", "achieved", "tokens", "epochs")
    windows = {"rows": 800, "largest_deviation": {"laws": 0.0031, "general": 0.0031}}
    write_json(directory / "mix.json", {
        "sources": {source: dict(zip(keys, values, strict=True)) for source, values in shares.items()}, "windows": windows,
    })  # fmt: skip
    pieces = [{"trained": False, "text": "user asks\n"}, {"trained": True, "text": f"answer {HOSTILE}{FENCE}"}]
    example = {"where": "data/x.jsonl:1", "tokens": 12, "packed_tokens": 9, "pieces": pieces}
    write_json(directory / "examples.json", {"laws": [example]})
    counts = {"rows": 782, "tokens": 400_000, "supervised_tokens": 120_000, "sources": ["laws", "general"],
              "added_tokens": ["<|im_start|>", "<|im_end|>"]}  # fmt: skip
    finish(directory, ["ledger.json", "mix.json", "examples.json"], counts, 12.3)
    return directory


def _account(tokens: int) -> dict[str, Any]:
    def pair(tokens: int) -> dict[str, int]:
        return {"documents": tokens // 100, "tokens": tokens}

    return {
        "read": pair(tokens + 700), "duplicate": pair(400), "dropped": {"short": pair(300)}, "kept": pair(tokens),
        "truncated": {"tokens": 0}, "unused": pair(100), "repeated": pair(100), "packed": pair(tokens),
        "split": pair(5000), "trained": {"tokens": tokens}, "supervised": {"tokens": tokens // 3}, "epochs": 1.5,
        "examples": {"short": "data/x.jsonl:17"},
    }  # fmt: skip


def _train(runs: Path, name: str, rows: Path, steps: int = 80) -> Path:
    what = {"stage": name, "init": {"sha": "x"}, "rows": {"key": "k"}, "seq_len": 512, "learning_rate": 1e-3,
            "min_lr_ratio": 0.1, "warmup_ratio": 0.05, "batch_tokens": 8192, "weight_decay": 0.0,
            "adam_betas": [0.9, 0.95], "max_grad_norm": 1.0, "seed": 0}  # fmt: skip
    directory = write_order(Order(name, "train", "regulator", what, HOW, {"init": "base", "rows": str(rows)}), runs)
    lines = []
    for step in range(1, steps + 1):
        loss = 1.2 + 3 * math.exp(-step / 15) + 0.1 * math.sin(step * 7)
        rate = 1e-4 + 9e-4 * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        by_source = {"laws": loss - 0.2} | ({"general": 0.7} if step % 3 else {})
        lines.append({"step": step, "loss": loss, "lr": rate, "grad_norm": 1.0, "tokens": 8192, "seconds": 1.0,
                      "tokens_per_second": 8192.0, "loss_by_source": by_source})  # fmt: skip
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    counts = {"steps": steps, "tokens": 400_000, "supervised_tokens": 120_000, "final_loss": 1.21, "precision": "fp32",
              "weights_moved_share": 0.99987, "tokens_per_second": 8192.4, "resumed_from": [], "wrapper": "none",
              "new_embedding_rows": 2 if name == "cpt" else 0, "attention": "sdpa"}  # fmt: skip
    finish(directory, ["metrics.jsonl"], counts, 62.0)
    return directory


def _evaluate(runs: Path, role: str) -> Path:
    column = ("base", "cpt", "sft").index(role)
    what = {"model": {"role": role}, "tasks": {"domain": DOMAIN, "general": GENERAL}, "limit": None,
            "files": [{"path": "configs/lm_eval/violations.yaml", "sha256": "cd" * 32}]}  # fmt: skip
    directory = write_order(Order(f"evaluate_{role}", "evaluate", "regulator", what, HOW, {"model": "m"}), runs)
    write_json(directory / "results.json", {
        "tasks": {task: {m: values[column] for m, (values, _) in metrics.items()} for task, metrics in METRICS.items()},
        "n": dict.fromkeys(METRICS, 12),
        "higher_is_better": {task: {m: higher for m, (_, higher) in metrics.items()} for task, metrics in METRICS.items()},
        "asked": {task: task for task in METRICS},
    })  # fmt: skip
    (directory / "samples").mkdir()
    for task in METRICS:
        text = task == "violations"
        lines = [
            {"doc_id": i, "prompt": f"form {i} {HOSTILE}", "target": f"directive {i} {FENCE}",
             "response": f"{role} says {i} {HOSTILE} {BACKTICKS}" if text else -12.5, "metrics": {"overlap": 0.5}}
            for i in range(12)
        ]  # fmt: skip
        (directory / "samples" / f"{task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    finish(directory, ["results.json", "samples"], {"tasks": len(METRICS), "samples": 48}, 17.0)
    return directory
