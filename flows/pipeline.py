"""The pipeline: documents and chats in, an evaluated specialist and its report out.

    python -m flows.pipeline --config configs/regulator.yaml --hardware cpu
    python -m flows.pipeline --config ... --only sft          one stage, from what stands before it
    python -m flows.pipeline --config ... --until cpt         everything up to a stage
    python -m flows.pipeline --config ... --force sft         again, though it stands; the old one is set aside
    python -m flows.pipeline --config ... --plan              what these would run and why; runs nothing

Exit codes: 0 done; 2 bad input; 75 a worker was stopped and saved a checkpoint, run again to resume; 1 anything else;
130 Ctrl-C. A SIGTERM to the pipeline itself ends it by that signal (143), once its worker has saved.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from prefect import flow, tags
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run

from flows.console import calm
from flows.credentials import VARIABLE as SECRETS
from flows.credentials import load_secrets
from flows.heartbeat import wake_heartbeats
from flows.overlap import skip
from flows.parameters import DEFAULT_CONFIG, Config, HardwareOrDefault, Stage
from flows.pools import TAG
from flows.reach import require_server
from flows.routing import hand_over
from flows.tether import tie_temporary_server
from tasks.artifacts import flush, show_plan
from tasks.config import load_config, locate
from tasks.errors import EXIT_PREEMPTED, EXIT_USER_ERROR, UserError
from tasks.evaluate import evaluate
from tasks.forecast import lines, missing_for, preflight
from tasks.launch import Preempted, WorkerFailed
from tasks.machine import resolve_tag
from tasks.outcome import speaker
from tasks.plan import GROUPS, Planned, check_upstream, forced, make_plan, render, select
from tasks.prepare import prepare
from tasks.report import report
from tasks.reporting import result_table_text
from tasks.stage import ARTIFACT
from tasks.train import train

calm()  # here, so that a run that a worker starts is calm too
wake_heartbeats()


def run_name() -> str:
    """A flow run's name: `regulator on cpu`."""
    said = flow_run.parameters
    return f"{Path(said['config']).stem}" + (f" on {said['hardware']}" if said.get("hardware") else "")


@flow(name="pipeline", flow_run_name=run_name)
def pipeline(
    config: Config = DEFAULT_CONFIG,
    hardware: HardwareOrDefault = None,
    only: Stage | None = None,
    until: Stage | None = None,
    force: Stage | None = None,
) -> State[None] | None:
    """Data, CPT, SFT, evaluation, report: every stage reuses what stands and computes what does not.

    Args:
        config: A run's file below the project's root, as configs/regulator.yaml.
        hardware: A tag of configs/hardware.yaml, or auto; empty: the one that the config names.
        only: Run this stage alone, from what stands before it.
        until: Run everything up to this stage.
        force: Run this stage again though it stands; the old one is set aside. What a forced run began, goes on.
    """
    try:
        return _run(config, hardware, only, until, force)
    finally:
        flush()


# The parameters are plain text already; Prefect's own way imports fastapi for it, which takes 0.3 s.
pipeline.serialize_parameters = dict  # type: ignore[method-assign, assignment]


def _run(
    config: str, hardware: str | None, only: str | None, until: str | None, force: str | None
) -> State[None] | None:
    if skipped := skip():
        return skipped
    said = {"config": config, "only": only, "until": until, "force": force}
    if elsewhere := hand_over(hardware, load_config(config).hardware, said):
        return elsewhere
    load_secrets()
    plan = load_plan(config, hardware)
    wanted = select(plan, only, until)
    show_plan(plan)
    checked = forced(plan, wanted, force)
    announce(checked, wanted)
    check_upstream(checked, wanted)

    again = {force: flow_run.id}  # who asks: a retry of this run goes on from what it made, and does not force it anew
    rows: dict[str, Any] = {}
    models: list[Any] = []
    results = None
    for name in ("cpt", "sft"):  # the data of both stages first: bad data shows before hours of training
        if f"prepare_{name}" in wanted:
            rows[name] = prepare(plan[f"prepare_{name}"], force=again.get("prepare", ""))
    for name in ("cpt", "sft"):
        if name in wanted:
            models.append(train(plan[name], rows.get(name), *models, force=again.get(name, "")))
    if evaluations := [plan[name] for name in wanted if name.startswith("evaluate_")]:
        results = evaluate(evaluations, *models, force=again.get("evaluate", ""))
    if "report" in wanted:
        report(plan["report"], *rows.values(), *models, results, force=again.get("report", ""))
    return None


def load_plan(config: str, hardware: str | None) -> dict[str, Planned]:
    """The plan of a run's file; `hardware` overrides its tag."""
    run = load_config(config)
    where = "--hardware" if hardware else locate(Path(config), "hardware")
    tag, row = resolve_tag(hardware or run.hardware, where)
    return make_plan(run, Path(config), tag, row)


def announce(plan: dict[str, Planned], wanted: list[str]) -> None:
    """The first lines of a run: what its trainings will take. Refuses what this machine cannot do."""
    say = speaker()
    for line in lines(plan, wanted):
        say(line)
    preflight(plan, wanted)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _parse(argv)
    try:
        if os.environ.get(SECRETS):  # the plan may ask the hub for a gated model; only for them a server starts already
            tie_temporary_server()
            require_server()
            load_secrets()
        plan = load_plan(options.config, options.hardware)  # a bad config is told before any server starts
        if options.plan:
            wanted = select(plan, options.only, options.until)
            _show_plan(plan, wanted, options.force, load_config(options.config).unused_sources)
            return 0
        tie_temporary_server()
        require_server()
        with tags(TAG):  # so that the server knows it for ours: flows/automations.py
            pipeline(options.config, options.hardware, options.only, options.until, options.force)
        _show_results(plan)
        return 0
    except UserError as error:
        print(f"\n{error}\n", file=sys.stderr)
        return EXIT_USER_ERROR
    except Preempted as stopped:
        print(f"\n{stopped}", file=sys.stderr)
        return EXIT_PREEMPTED
    except WorkerFailed as failed:
        print(f"\n{failed}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to go on", file=sys.stderr)
        return 130


def _show_plan(plan: dict[str, Planned], wanted: list[str], force: str | None, unused: list[str]) -> None:
    plan = forced(plan, wanted, force)
    forecast = lines(plan, wanted, reused=True)
    print("\n".join([render({name: plan[name] for name in wanted}), *(["", *forecast] if forecast else [])]))
    if unused:
        print(f"\nno stage reads {', '.join(unused)}: named in `sources:`, and in no mix or replay")
    check_upstream(plan, wanted)
    if missing := missing_for(plan, wanted):
        print(f"\nnot on this machine: {missing.what}; {missing.todo}")


def _show_results(plan: dict[str, Planned]) -> None:
    directory = plan["report"].directory
    if (directory / ARTIFACT).is_file():
        print(f"\n{result_table_text(directory)}\n\nreport: {directory / 'report.html'}")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="flows.pipeline", description="CPT, then SFT, then proof.")
    parser.add_argument("--config", default=DEFAULT_CONFIG, help=f"a run's file (default {DEFAULT_CONFIG})")
    parser.add_argument("--hardware", help="a tag of configs/hardware.yaml, or auto (default: the config's)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", choices=GROUPS, help="run this stage alone")
    which.add_argument("--until", choices=GROUPS, help="run up to this stage")
    parser.add_argument("--force", choices=GROUPS, help="run this stage again though it stands; one that "
                         "--force began and did not finish goes on")  # fmt: skip
    parser.add_argument("--plan", action="store_true", help="print what these options would run and why, and stop")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
