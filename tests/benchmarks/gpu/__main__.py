"""Speed, memory and exactness on GPUs: `make benchmark-gpu`, or `python -m tests.benchmarks.gpu SUITE ... --out FOLDER`.

Every case runs in a process of its own on GPUs of its own, as many side by side as there are GPUs; peers in the same call
as ours. Medians after two steps. MFU is model FLOPs (forward and backward, no recomputation; tasks/model_shape.py)
a second against 790 TFLOP/s, the bf16 matrix rate measured on an H200.

`results.json` is what the plan reads its speeds from: keep it as `configs/measurements/CARD.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from tasks.cards import card_of
from tasks.launch import GUARD
from tasks.model_shape import shape_of
from tests.benchmarks.gpu.case import HOW
from tests.benchmarks.gpu.material import SHAPES, make_prepared, mean_context
from tests.benchmarks.gpu.suites import SUITES, Case

PEAK_FLOPS = 790e12
COLUMNS = ("name", "tokens_per_second", "mfu", "peak_gib", "reserved_gib", "optimizer_share", "first", "last", "held_out",
           "moved", "wall_seconds", "failed")  # fmt: skip
WIDTHS = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "head_dim", "tie_word_embeddings")  # fmt: skip
PACKAGES = ("torch", "transformers", "trl", "accelerate", "unsloth", "torchao", "liger_kernel", "triton")


def make_material(cases: list[Case], work: Path) -> None:
    """Models and rows that the cases name; models in processes of their own, which give their GPU back."""
    making = []
    for shape in {case["shape"] for case in cases if case["shape"] in SHAPES}:
        command = [sys.executable, "-m", "tests.benchmarks.gpu.material", str(work / shape), shape]
        making.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    for case in cases:
        rows = case["rows_per_step"] * case["steps"]
        case["model"] = case["shape"] if Path(case["shape"]).exists() else str(work / case["shape"])
        case["save"] = str(work / case["save"]) if case.get("save") else ""
        folder = work / f"rows-{case['text']}-{case['seq_len']}-{rows}-{case['mean']}"
        case["prepared"] = str(make_prepared(folder, rows, case["seq_len"], case["mean"], case["text"]))
        if held := case.get("held_out_rows"):
            folder = work / f"held-{case['text']}-{case['seq_len']}"
            case["held_out"] = str(make_prepared(folder, held, case["seq_len"], case["mean"], case["text"], seed=1))
    assert all(process.wait() == 0 for process in making), "a model could not be made"


class Runner:
    """Cases on GPUs: each gets as many as it has processes, the first that fits goes first."""

    def __init__(self, gpus: list[str], work: Path, out: Path, deadline: float) -> None:
        self.free, self.work, self.out, self.deadline = gpus, work, out, deadline
        self.card = card_of(_nvidia("name")[0])
        self.commit = os.environ.get("COMMIT") or _commit()
        self.running: dict[str, tuple[subprocess.Popen[bytes], list[str], Case, float]] = {}
        self.results: list[dict[str, Any]] = []

    def run(self, cases: list[Case]) -> None:
        """Run all of them, or say that there was no time left."""
        waiting = list(cases)
        while waiting or self.running:
            if time.monotonic() > self.deadline:
                self.results += [{"name": case["name"], "failed": "no time left"} for case in waiting]
                waiting = []
            done = {result["name"] for result in self.results}
            failed = {result["name"] for result in self.results if "failed" in result}
            for case in list(waiting):
                if case.get("after") in failed:
                    waiting.remove(case)
                    self.results.append({"name": case["name"], "failed": f"{case['after']} failed"})
                elif len(set(self.free)) >= case.get("processes", 1) and case.get("after", "") in {"", *done}:
                    waiting.remove(case)
                    self._start(case)
            time.sleep(0.5)
            for name in [name for name, (process, *_) in self.running.items() if self._is_over(name, process)]:
                self._collect(name)

    def _start(self, case: Case) -> None:
        # The least busy first; never one GPU for two processes of a case.
        gpus = sorted(set(self.free), key=lambda gpu: (-self.free.count(gpu), gpu))[: case.get("processes", 1)]
        for gpu in gpus:
            self.free.remove(gpu)
        path, result = self.work / f"{case['name']}.case.json", self.work / f"{case['name']}.json"
        path.write_text(json.dumps(case))
        result.unlink(missing_ok=True)
        launcher = [sys.executable, "-m"]
        if len(gpus) > 1:
            launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(len(gpus)), "-m"]
        environment = os.environ | {
            "CUDA_VISIBLE_DEVICES": ",".join(gpus),
            "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        }
        environment |= case.get("environment", {})
        with (self.out / f"{case['name']}.log").open("w") as log:
            # The guard ends torchrun's ranks too, which stand in sessions of their own.
            command = [sys.executable, "-S", GUARD, "--grace", "2", "--", *launcher, "tests.benchmarks.gpu.case"]
            process = subprocess.Popen([*command, str(path), str(result)], stdout=log, stderr=log, env=environment)
        self.running[case["name"]] = (process, gpus, case, time.monotonic() + case.get("timeout_seconds", 240))

    def _is_over(self, name: str, process: subprocess.Popen[bytes]) -> bool:
        if process.poll() is None and time.monotonic() > min(self.deadline, self.running[name][3]):
            process.terminate()
            process.wait()
        return process.poll() is not None

    def _collect(self, name: str) -> None:
        process, gpus, case, ends = self.running.pop(name)
        self.free += gpus
        path, log = self.work / f"{name}.json", self.out / f"{name}.log"
        if path.exists():
            result = self._of_the_model(case) | json.loads(path.read_text())  # what it found counts, not what was asked
            result["mfu"] = round(result["tokens_per_second"] * result.pop("flops_per_token") / PEAK_FLOPS, 4)
            for path_of_this_machine in ("prepared", "save"):
                result.pop(path_of_this_machine, None)
            result |= {"first": round(result["losses"][0], 4), "last": round(result["losses"][-1], 4)}
        else:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            errors = [line for line in lines if "Error" in line and "ChildFailed" not in line]
            result = {"name": name, "failed": (errors or lines or [f"ended with {process.returncode}"])[-1][:240]}
            if time.monotonic() > min(self.deadline, ends):
                result["failed"] = "not done when its time was up; last: " + result["failed"]
        self.results.append(result)
        print("  ".join(f"{column}={result[column]}" for column in COLUMNS if column in result), flush=True)
        self.write()

    def _of_the_model(self, case: Case) -> dict[str, Any]:
        """What the plan wants to know of a measured run (tasks/speed.py), beside what the case says itself."""
        config = json.loads((Path(case["model"]) / "config.json").read_text())
        flops = shape_of(config).flops_per_token(mean_context(Path(case["prepared"])))
        how = {name: HOW[name] for name in ("backend", "precision", "offload", "compile", "processes")}
        return (how if case["tool"] == "steep" else {}) | case | {
            "model": {"name": case["shape"], "config": {name: config[name] for name in WIDTHS if name in config}},
            "flops_per_token": flops, "card": self.card, "commit": self.commit,
        }  # fmt: skip

    def write(self) -> None:
        """All results so far, with what they came from."""
        versions = {name: _version(name) for name in PACKAGES}
        said = {"gpus": _nvidia("name"), "versions": versions, "rows": self.results}
        (self.out / "results.json").write_text(json.dumps(said, indent=1) + "\n")


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _nvidia(field: str) -> list[str]:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().splitlines()


def main() -> None:
    """Run suites until they are done or the time is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suites", nargs="*", default=["speed"])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-gpu"))
    parser.add_argument("--work", type=Path, default=Path("/tmp/steep-benchmark"))  # models of 16 GB
    parser.add_argument("--slots", type=int, default=1, help="cases a GPU at a time, where nothing is timed")
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument(
        "--gpus", default="", help="indices, separated by commas; else those of CUDA_VISIBLE_DEVICES, or all"
    )
    parser.add_argument("--only", default="", help="cases whose name holds one of these words")
    options = parser.parse_args()
    if shutil.which("nvidia-smi") is None:
        sys.exit("error: no GPU here: nvidia-smi is not on the PATH")
    for folder in (options.out, options.work):
        folder.mkdir(parents=True, exist_ok=True)
    named = options.gpus or os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = named.split(",") if named else _nvidia("index")
    by_name = {case["name"]: dict(case) for suite in options.suites for case in SUITES[suite]}  # suites share cases
    cases = list(by_name.values())
    if options.only:
        named = [case for case in cases if any(word in case["name"] for word in options.only.split("|"))]
        needed = {case.get("after") for case in named}
        cases = [case for case in cases if case in named or case["name"] in needed]
    cases = [case for case in cases if case.get("processes", 1) <= len(gpus)]
    deadline = time.monotonic() + options.seconds
    make_material(cases, options.work)
    Runner(gpus * options.slots, options.work, options.out, deadline).run(cases)


if __name__ == "__main__":
    main()
