"""Speed, memory and exactness on GPUs: `make benchmark-gpu`, or `python -m tests.benchmarks.gpu SUITE ... [--out FOLDER]`.

Every case runs in a process of its own, peers beside ours in one call. Rows of 4096 tokens, documents of 600 tokens on
average, 65,536 tokens a step; medians after two steps. MFU is model FLOPs (forward and backward, no recomputation; see
`material.flops_per_token`) against 790 TFLOP/s, the bf16 matrix rate measured on an H200.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.gpu.material import SEQ_LEN, flops_per_token, make_prepared, mean_context
from tests.benchmarks.gpu.suites import SUITES

PEAK_FLOPS = 790e12
COLUMNS = (
    "name",
    "tokens_per_second",
    "mfu",
    "peak_gib",
    "reserved_gib",
    "optimizer_share",
    "first",
    "last",
    "wall_seconds",
)


def run_case(case: dict[str, Any], work: Path, out: Path) -> dict[str, Any]:
    """One case in its own process (or under torchrun), stopped after its time; its result or why there is none."""
    seq_len = case.setdefault("seq_len", SEQ_LEN)
    rows = case["rows_per_step"] * case["steps"]
    case["model"] = str(work / case["shape"])
    # In a process of its own: what it allocates on the GPU must be gone before a case is measured.
    making = [sys.executable, "-m", "tests.benchmarks.gpu.material", case["model"], case["shape"]]
    subprocess.run(making, check=True, capture_output=True)
    case["prepared"] = str(make_prepared(work / f"rows-{seq_len}-{rows}", rows, seq_len, case.get("mean", 600)))
    paths = [work / f"{case['name']}.case.json", work / f"{case['name']}.json", out / f"{case['name']}.log"]
    paths[0].write_text(json.dumps(case))
    launcher = [sys.executable, "-m"]
    if case.get("processes", 1) > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(case["processes"]), "-m"]
    environment = os.environ | {"PYTORCH_ALLOC_CONF": "expandable_segments:True"} | case.get("environment", {})
    with paths[2].open("w") as log:
        command = [*launcher, "tests.benchmarks.gpu.case", str(paths[0]), str(paths[1])]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            process.wait(case.get("timeout_seconds", 180))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
    if not paths[1].exists():
        lines = [line for line in paths[2].read_text(errors="replace").splitlines() if line.strip()]
        return {"name": case["name"], "failed": lines[-1][:300] if lines else f"ended with {process.returncode}"}
    result: dict[str, Any] = json.loads(paths[1].read_text())
    flops = flops_per_token(Path(case["model"]), mean_context(Path(case["prepared"])))
    return result | {"mfu": round(result["tokens_per_second"] * flops / PEAK_FLOPS, 4),
                     "first": round(result["losses"][0], 4), "last": round(result["losses"][-1], 4)}  # fmt: skip


def main() -> None:
    """Run suites until they are done or the time is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suites", nargs="*", default=["speed"], choices=[*SUITES, []])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-gpu"))
    parser.add_argument("--work", type=Path, default=Path("/tmp/steep-benchmark"))  # models of 16 GB
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + options.seconds
    results = []
    for case in [case for suite in options.suites for case in SUITES[suite] if options.only in case["name"]]:
        left = deadline - time.monotonic()
        if left < 30:
            results.append({"name": case["name"], "failed": "no time left"})
            continue
        result = run_case(
            dict(case) | {"timeout_seconds": min(left, case.get("timeout_seconds", 180))}, options.work, options.out
        )
        results.append(result)
        print(
            "  ".join(f"{column}={result[column]}" for column in (*COLUMNS, "failed") if column in result), flush=True
        )
        (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
