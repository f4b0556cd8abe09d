"""What would run, what is reused, and why.

`make_plan` turns a run's config into one `Planned` a stage, in the order of the DAG. Every key follows from the config
and the digests of files, so the whole plan is known before anything runs. A stage is stale when no finished directory
has its key; the reasons are the differences between its order and the nearest finished one of the same stage and run.

Imports neither Prefect nor torch: `make plan` answers at once.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tasks.choose import Choice, Job, choose, evaluation_dtype
from tasks.config import Hardware, Run, TrainStage
from tasks.digests import Digests
from tasks.errors import UserError, parse
from tasks.hardware import place
from tasks.model_shape import ModelShape, shape_if_known
from tasks.reasons import differences, shortened
from tasks.resolve import BaseModelFiles, resolve_base_model, resolve_sources
from tasks.stage import (
    ARTIFACT,
    ERROR,
    ORDER,
    VERSIONS,
    Order,
    canonical_json,
    damage,
    read_json,
    read_sound_artifact,
    read_sound_order,
)
from tasks.task_files import resolve_task_files

GROUPS = ("prepare", "cpt", "sft", "evaluate", "report")  # what --only, --until and --force name
# What of a stage the next one computes from; logs, metrics and timings may differ between equal runs.
PRIMARY_OUTPUT = {"prepare": "rows.arrow", "train": "model/", "evaluate": "results.json", "report": "results.csv"}
NEW, INTERRUPTED, FAILED = "not yet run", "interrupted before it was finished", "failed: "


@dataclass(frozen=True)
class Planned:
    """One stage of a run: its order, its directory, and what will happen to it."""

    order: Order
    directory: Path
    reasons: tuple[str, ...]  # why it must run; empty when it is reused
    resumes: bool = False  # a run of it was interrupted; it goes on from there
    choice: Choice | None = None  # of a training: the settings that it will run with, and what they take
    budget_tokens: int | None = None  # of a training whose budget is in tokens
    unfit: UserError | None = None  # of a training that is reused: why it could not run here again

    @property
    def stage(self) -> str:
        """The stage's name: prepare_cpt, cpt, evaluate_base, ..."""
        return self.order.stage

    @property
    def group(self) -> str:
        """The name by which the command line calls it: prepare, cpt, sft, evaluate, report."""
        return self.stage.split("_")[0]

    @property
    def is_new(self) -> bool:
        """Whether no run has finished it before, in whatever form."""
        return self.reasons in ((NEW,), (INTERRUPTED,)) or "".join(self.reasons).startswith(FAILED)

    @property
    def reused(self) -> bool:
        """Whether its artifact stands and is what this run would compute."""
        return not self.reasons


def make_plan(run: Run, config_path: Path, tag: str, hardware: Hardware) -> dict[str, Planned]:
    """Every stage of the run by name, in the order of the DAG. Writes only the cache of digests."""
    runs = Path(run.runs_dir)
    with Digests(runs) as digests:
        base = resolve_base_model(run, config_path, digests)
        orders = list(_orders(run, config_path, base, digests, runs))
    how, shape = {"tag": tag, **place(hardware), **base.how}, shape_if_known(Path(base.path))
    plan: dict[str, Planned] = {}
    for order in orders:
        planned = _follow(_judge(replace(order, how=how | order.how), runs), plan)
        if order.kind == "train":
            planned = _settle(planned, run, tag, hardware, shape)
        if order.kind == "evaluate":
            planned.order.how["dtype"] = evaluation_dtype(hardware, shape)
        plan[planned.stage] = planned
    return plan


def _follow(planned: Planned, before: dict[str, Planned]) -> Planned:
    """Stale where something that it was computed from is made again, though its own key is the same."""
    read = upstream(planned.order, planned.directory.parent)
    redone = [p.stage for p in before.values() if not p.reused and p.directory.name in read]
    if not planned.reused or not redone:
        return planned
    return replace(planned, reasons=tuple(f"{name} runs again" for name in redone))


def _settle(planned: Planned, run: Run, tag: str, hardware: Hardware, shape: ModelShape | None) -> Planned:
    """A training with its settings. Raises `UserError` where it does not fit and has to run."""
    stage = run.train_stages[planned.stage]
    job = Job(shape, run.model.seq_len, stage.batch_tokens // run.model.seq_len) if shape else None
    try:
        choice = choose(tag, hardware, job)
    except UserError as unfit:
        if not planned.reused:
            raise
        return replace(planned, unfit=unfit)
    order = replace(planned.order, how=choice.how | planned.order.how)
    return replace(planned, order=order, choice=choice, budget_tokens=stage.tokens)


def select(plan: dict[str, Planned], only: str | None, until: str | None) -> list[str]:
    """The stages that --only or --until leave, in order."""
    if only and until:
        raise UserError("'only' is one stage, 'until' everything up to one", where="only, until", todo="give one")
    if only:
        return [stage for stage, planned in plan.items() if planned.group == only]
    groups = GROUPS[: GROUPS.index(until) + 1] if until else GROUPS
    return [stage for stage, planned in plan.items() if planned.group in groups]


def forced(plan: dict[str, Planned], wanted: list[str], group: str | None) -> dict[str, Planned]:
    """The plan as --force makes it: of the wanted stages that group runs again, and what was computed from it."""
    after: dict[str, Planned] = {}
    for name, planned in plan.items():
        again = planned.reused and planned.group == group and name in wanted
        if again and planned.unfit:
            raise planned.unfit
        after[name] = replace(planned, reasons=("forced",)) if again else _follow(planned, after)
    return after


def check_upstream(plan: dict[str, Planned], wanted: list[str]) -> None:
    """Refuse, before the first stage begins, what reads a stage that neither stands nor runs before it."""
    made = {plan[name].directory.name for name in wanted}
    for planned in (plan[name] for name in wanted if not plan[name].reused):
        read = upstream(planned.order, planned.directory.parent)
        if missing := [name for name, path in read.items() if name not in made and not output_digest(path)]:
            raise not_computed(planned, missing)


def not_computed(planned: Planned, missing: list[str]) -> UserError:
    """That a stage reads what does not stand."""
    return UserError(
        f"{planned.stage} reads {', '.join(missing)}, which has not been computed",
        where=str(planned.directory.parent),
        todo=f"run the stages before it too: --until {planned.group}",
    )


def render(plan: dict[str, Planned]) -> str:
    """The plan as text: a line a stage, with the reasons of what is stale."""
    lines = []
    for planned in plan.values():
        verb = "reuse" if planned.reused else "resume" if planned.resumes else "run" if planned.is_new else "stale"
        lines.append(f"{verb:<7}{planned.directory.name:<26}{'; '.join(planned.reasons)}".rstrip())
    return "\n".join(lines)


def output_digest(directory: Path) -> str:
    """Digest of what the next stage computes from, as the artifact recorded it; empty while it is not finished."""
    artifact, order = read_sound_artifact(directory), read_sound_order(directory)
    if not artifact or not order:
        return ""
    primary = PRIMARY_OUTPUT[order.kind]
    said = {name: of["sha256"] for name, of in artifact["outputs"].items() if name.startswith(primary)}
    return hashlib.sha256(canonical_json(said).encode()).hexdigest()


def upstream(order: Order, runs: Path) -> dict[str, Path]:
    """The stages' directories that an order reads from, by name; the base model's folder is none of them."""
    paths = [Path(path) for path in order.inputs.values()]
    directories = [path.parent if path.name == "model" and path.parent.parent == runs else path for path in paths]
    return {path.name: path for path in directories if path.parent == runs}


# --- orders, in the order of the DAG --------------------------------------------------------------------------------


def _orders(run: Run, config_path: Path, base: BaseModelFiles, digests: Digests, runs: Path) -> Iterator[Order]:
    models = {"base": (base.identity, base.path)}
    made: list[Order] = []
    for name, stage in run.train_stages.items():
        rows = _prepare_order(run, config_path, name, stage, base, digests)
        init_identity, init_path = list(models.values())[-1]
        what = {"stage": name, "init": init_identity, "rows": {"key": rows.key}, "seq_len": run.model.seq_len}
        what |= stage.model_dump(include=_TRAINING_FIELDS, mode="json") | {"seed": run.seed}
        if stage.max_loss_spike is not None:  # it decides which steps count, so another value is another result
            what["max_loss_spike"] = stage.max_loss_spike
        # `on_nan` decides whether a result comes out and never which: a stage that broke goes on where it stopped.
        how = {"checkpoint": stage.checkpoint.model_dump(), "report_to": run.report_to, "on_nan": stage.on_nan,
               "max_skipped": stage.max_skipped}  # fmt: skip
        inputs = {"init": init_path, "rows": str(rows.directory(runs))}
        train = Order(name, "train", run.name, what, how, inputs)
        models[name] = ({"stage": name, "key": train.key}, str(train.directory(runs) / "model"))
        made += [rows, train]
    made += _evaluate_orders(run, config_path, models, digests)
    made.append(_report_order(run, made, runs))
    # Rows of every stage first: bad data is found before hours of training.
    yield from sorted(made, key=lambda order: order.kind != "prepare")


_TRAINING_FIELDS = {"learning_rate", "min_lr_ratio", "warmup_ratio", "batch_tokens", "weight_decay", "adam_betas",
                    "max_grad_norm"}  # fmt: skip


def _prepare_order(
    run: Run, config_path: Path, name: str, stage: TrainStage, base: BaseModelFiles, digests: Digests
) -> Order:
    what = {
        "stage": name,
        "tokenizer": base.tokenizer,
        "chat_template": base.chat_template,
        "seq_len": run.model.seq_len,
        "max_positions": base.max_positions,
        "vocab_size": base.vocab_size,
        "sources": resolve_sources(run, config_path, list(stage.shares), digests),
        **stage.model_dump(include={"tokens", "epochs", "mix", "replay", "max_epochs", "overflow"}, mode="json"),
        "seed": run.seed,
    }
    # Every core, whatever trains; the rows do not depend on it. Errors of the worker name lines of the run's file.
    how = {"processes": len(os.sched_getaffinity(0)), "config": str(config_path)}
    return Order(f"prepare_{name}", "prepare", run.name, what, how, {"model": base.path})


def _evaluate_orders(
    run: Run, config_path: Path, models: dict[str, tuple[dict[str, Any], str]], digests: Digests
) -> list[Order]:
    if run.evaluate is None:
        return []
    files, on_hub = resolve_task_files(run.evaluate, config_path, digests)
    common = {
        "tasks": {"domain": run.evaluate.domain, "general": run.evaluate.general},
        "files": files,
        "limit": run.evaluate.limit,
    }
    orders = []
    for role, (identity, path) in models.items():
        what = {"model": {"role": role, **identity}, **common}
        inputs = {"model": path, "include_path": run.evaluate.include_path}
        orders.append(Order(f"evaluate_{role}", "evaluate", run.name, what, {"hub": on_hub}, inputs))
    return orders


def _report_order(run: Run, made: list[Order], runs: Path) -> Order:
    what = {
        "stages": {order.stage: order.key for order in made},
        "gate": run.gate.model_dump() if run.gate else None,
        "domain": run.evaluate.domain if run.evaluate else [],
        "general": run.evaluate.general if run.evaluate else [],
    }
    return Order("report", "report", run.name, what, {"threads": 1}, {o.stage: str(o.directory(runs)) for o in made})


# --- reused, resumed or stale, and why ------------------------------------------------------------------------------


def _judge(order: Order, runs: Path) -> Planned:
    directory = order.directory(runs)
    if not (directory / ARTIFACT).is_file():
        resumes = any(directory.glob("checkpoints/*")) and not changed_inputs(directory)
        return Planned(order, directory, tuple(_why_stale(order, runs)), resumes)
    return Planned(order, directory, tuple(why_not_reused(directory)))


def why_not_reused(directory: Path) -> list[str]:
    """Empty when a finished stage can be reused: its outputs are unharmed and its inputs are still what it read."""
    if not (directory / ARTIFACT).is_file():
        return ["not finished"]
    if found := damage(directory):
        return [found]
    return [f"{name} was computed again with another result" for name in changed_inputs(directory)]


def changed_inputs(directory: Path) -> list[str]:
    """The stages that were computed again, with another result, since the one in `directory` began to read them."""
    order = read_sound_order(directory)
    recorded = order.how.get("input_digests", {}) if order else {}
    now = {name: output_digest(directory.parent / name) for name in recorded}
    return [name for name in now if now[name] not in ("", recorded[name])]


def _why_stale(order: Order, runs: Path) -> list[str]:
    with suppress(OSError):  # the last try said what it did not like; a new one removes it
        return [FAILED + parse((order.directory(runs) / ERROR).read_text()).what.partition("\n")[0]]
    earlier = _nearest_order(order, runs)
    if earlier is None:
        return [INTERRUPTED if (order.directory(runs) / ORDER).exists() else NEW]
    if earlier["version"] != VERSIONS[order.kind]:
        return [f"worker version {earlier['version']} -> {VERSIONS[order.kind]}"]
    return shortened(differences(earlier["what"], order.what)) or [INTERRUPTED]


def _nearest_order(order: Order, runs: Path) -> dict[str, Any] | None:
    """Of the finished orders of the same stage and run, the newest of those with the fewest differences."""
    found = []
    for path in runs.glob(f"{order.stage}-*/{ORDER}"):
        sound, raw, artifact = read_sound_order(path.parent), read_json(path), path.with_name(ARTIFACT)
        if sound and sound.run == order.run and raw and artifact.is_file():
            found.append((len(differences(raw["what"], order.what)), -artifact.stat().st_mtime_ns, raw))
    return min(found, key=lambda item: item[:2])[2] if found else None
