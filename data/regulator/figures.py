"""The example's figures: `python -m data.regulator.figures [--seeds 0 1 2] [--only ARM ...]`.

Runs `configs/regulator.yaml` and its variations through the real stages, three seeds each, and writes
`data/regulator/figures.json` and the README's table. Every variation differs from the shipped run in one thing:

    shipped         CPT with 10 % replay, then SFT
    sft_only        the same chats, steps and rates, without CPT
    replay_0, replay_5, replay_25      CPT alone with another share of replay; the number of steps is the same

A stage that two runs share is computed once, and a stage that stands is reused.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from tasks.config import load_config
from tasks.execute import compute
from tasks.machine import resolve_tag
from tasks.plan import Planned, make_plan
from tasks.provenance import git_commit, installed_versions
from tasks.stage import write_json

CONFIG = Path("configs/regulator.yaml")
OUT = Path("data/regulator/figures.json")
MODULES = {"prepare": "tasks.preparation", "train": "tasks.training", "evaluate": "tasks.evaluation"}
REPLAY_SHARES = (0, 5, 25)  # percent, beside the shipped 10
ARMS = ("shipped", "sft_only", *(f"replay_{share}" for share in REPLAY_SHARES))
METRICS = {
    "violation F1": ("regulator_reports", "violation_f1"),
    "directive ROUGE-L": ("regulator_reports", "directive_rouge_l"),
    "domain bits per byte": ("regulator_bpb", "bits_per_byte"),
    "general bits per byte": ("general_bpb", "bits_per_byte"),
    "general facts": ("general_facts", "acc"),
}


def main() -> None:
    """Run every arm and seed, then write the figures and print the table."""
    parser = argparse.ArgumentParser(description="Run the example's arms and write their figures.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=ARMS, default=ARMS, metavar="ARM")
    parser.add_argument("--hardware", default="cpu", metavar="TAG")
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="runs at once; each takes a core or more")
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args()
    cells = [(arm, seed) for seed in asked.seeds for arm in asked.only]
    threads = max(1, (os.cpu_count() or 1) // asked.parallel) if asked.parallel > 1 else None
    plans = [plan_arm(arm, seed, asked.hardware, threads) for arm, seed in cells]  # first: they share a cache
    with ThreadPoolExecutor(asked.parallel) as pool:
        values = list(pool.map(run_arm, plans))
    runs = [{"arm": arm, "seed": seed, "values": found} for (arm, seed), found in zip(cells, values, strict=True)]
    figures = {"commit": git_commit(), "machine": machine(), "hardware": asked.hardware,
               "versions": installed_versions(), "runs": runs, "table": table(runs)}  # fmt: skip
    write_json(asked.out, figures)
    print(render(figures["table"]))


def plan_arm(arm: str, seed: int, tag: str, threads: int | None) -> dict[str, Planned]:
    """The stages of one arm and seed; `threads` keeps runs at once out of each other's cores."""
    config, (tag, hardware) = write_config(arm, seed), resolve_tag(tag)
    return make_plan(
        load_config(config), config, tag, hardware.model_copy(update={"threads": threads or hardware.threads})
    )


def run_arm(plan: dict[str, Planned]) -> dict[str, dict[str, float]]:
    """Compute one run's stages; the metrics of each of its models. Runs at once share stages through their locks."""
    for kind, module in MODULES.items():
        stages = [planned for planned in plan.values() if planned.order.kind == kind]
        # lm-eval is loaded once for what this run made; all runs share the base, so it is not locked with the rest
        groups = [stages[:1], stages[1:]] if kind == "evaluate" else [[stage] for stage in stages]
        for group in groups:
            name = group[0].order.run
            compute(group, module, lambda text, name=name: print(f"{name:<24}{text}", flush=True))  # type: ignore[misc]
    found = {}
    for stage, planned in plan.items():
        if planned.order.kind == "evaluate":
            tasks = json.loads((planned.directory / "results.json").read_text())["tasks"]
            found[stage.removeprefix("evaluate_")] = {name: tasks[task][key] for name, (task, key) in METRICS.items()}
    return found


def write_config(arm: str, seed: int) -> Path:
    """The run's file of one arm and seed."""
    config = yaml.safe_load(CONFIG.read_text()) | {"seed": seed, "name": f"regulator-{arm}-{seed}".replace("_", "-")}
    if arm == "sft_only":
        del config["cpt"]
    elif arm.startswith("replay_"):
        share = int(arm.removeprefix("replay_")) / 100
        config["cpt"]["replay"] = {"general": share} if share else {}
        del config["sft"]  # what a share of replay costs and saves shows after CPT
    path = Path(config.get("runs_dir", "runs")) / "figures" / f"{config['name']}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def table(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line a model: mean and range of every metric over the seeds."""
    lines = []
    for label, arm, role in models():
        values = [run["values"][role] for run in runs if run["arm"] == arm and role in run["values"]]
        if values:
            lines.append({"model": label, "seeds": len(values)} | {
                name: summary([value[name] for value in values]) for name in METRICS
            })  # fmt: skip
    return lines


def models() -> list[tuple[str, str, str]]:
    """Label, arm and role of every line of the table."""
    shares = [(f"CPT, {share} % replay", f"replay_{share}", "cpt") for share in REPLAY_SHARES]
    shares.insert(2, ("CPT, 10 % replay", "shipped", "cpt"))
    sft = [("SFT only", "sft_only", "sft"), ("CPT, 10 % replay, then SFT", "shipped", "sft")]
    return [("base", "shipped", "base"), *shares, *sft]


def summary(values: list[float]) -> dict[str, float]:
    """Mean, lowest and highest."""
    return {"mean": statistics.fmean(values), "min": min(values), "max": max(values)}


def render(lines: list[dict[str, Any]]) -> str:
    """The table in Markdown; the range over seeds stands in parentheses where it is not zero."""
    head = ["model", "seeds", *METRICS]
    rows = [[line["model"], str(line["seeds"]), *(_cell(line[name]) for name in METRICS)] for line in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def _cell(value: dict[str, float]) -> str:
    low, high = f"{value['min']:.3f}", f"{value['max']:.3f}"
    return f"{value['mean']:.3f}" + (f" ({low} to {high})" if low != high else "")


def machine() -> str:
    """What computed the figures, in words."""
    return f"{os.cpu_count()} CPU cores, {platform.machine()}, Python {platform.python_version()}"


if __name__ == "__main__":
    main()
