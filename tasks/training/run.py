"""One training stage from its order to its counts: rows, model, training, export. Called by `__main__` on
every process."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch.distributed as dist
from transformers import PrinterCallback

from tasks.errors import UserError
from tasks.progress import say
from tasks.stage import Order, read_artifact, read_json, write_json, write_text
from tasks.training import checkpoint, export
from tasks.training.attention import attention_plan
from tasks.training.callbacks import StepLog
from tasks.training.health import Health
from tasks.training.loss import StepSums
from tasks.training.metrics import METRICS, read_metrics, steps_logged
from tasks.training.model import (
    add_token_rows,
    check_init,
    describe,
    is_rounded,
    load_tokenizer,
    prepare_model,
    resolve_init,
)
from tasks.training.precision import ROUNDED_HANDOVER, precision_policy
from tasks.training.preemption import finishing_steps
from tasks.training.rows import Layout, load_rows, make_collate
from tasks.training.trackers import TENSORBOARD, check_tracker
from tasks.training.trainer import ADAM_EPSILON, RowTrainer, make_config

OUTPUTS = (export.MODEL, METRICS, TENSORBOARD)
RESUMES = "resumed_from.json"


@dataclass(frozen=True)
class Inputs:
    """What a stage reads, checked."""

    init: Path  # the folder of the model to start from
    tokenizer: Any
    new_tokens: list[str]  # those of the tokenizer that the model has no trained row for
    rows: Any  # the last one is a filler
    said: dict[str, Any]  # the counts of the prepared rows


def train(directory: Path, order: Order, backend: ModuleType) -> dict[str, Any]:
    """Train, export, and return the counts of the artifact."""
    is_main = backend.rank() == 0
    fitted = fit(directory, order, backend)
    if is_main:
        say(f"{order.stage:<14}exporting the model")
    tensors = backend.full_tensors(fitted.trainer.model)
    if not is_main:
        for _ in tensors:  # every process gives its part
            pass
        return {}
    moved = save(directory, fitted.inputs, fitted.trainer, tensors)
    return count(directory, fitted.layout) | fitted.facts | {"weights_moved_share": moved}


@dataclass(frozen=True)
class Fitted:
    """A trained model and how it came about."""

    trainer: RowTrainer
    inputs: Inputs
    layout: Layout
    facts: dict[str, Any]  # for the artifact


def fit(directory: Path, order: Order, backend: ModuleType) -> Fitted:
    """Load, train to the last step (or raise `Preempted`), and say what came about."""
    what, is_main = order.what, backend.rank() == 0
    precision = precision_policy(order.how["precision"])
    inputs = read_inputs(directory, order)
    layout = plan_layout(what, order.how, len(inputs.rows) - 1, backend.world_size())

    tell = say if is_main else lambda text: None
    if precision.warning:
        tell(f"{order.stage:<14}warning: {precision.warning}")
    if is_rounded(inputs.init, precision):
        tell(f"{order.stage:<14}warning: {ROUNDED_HANDOVER}")
    tell(f"{order.stage:<14}loading {inputs.init}")
    model = backend.load_model(inputs.init, precision, what["seq_len"], order.how)
    if changed := export.mend_generation(model):
        tell(f"{order.stage:<14}warning: the base's generation_config.json is invalid; in the export {changed}")
    num_new_rows = add_token_rows(model, inputs.tokenizer, inputs.new_tokens)
    prepare_model(model, order.how)
    threads = backend.set_threads(order.how, model.num_parameters())
    tell(f"{order.stage:<14}{describe(model)}; {layout.num_steps} steps of {layout.rows_per_step} rows")

    config = make_config(directory, what, layout, precision, backend.trainer_settings(order.how, precision))
    trainer = assemble(directory, order, backend, config, inputs, layout, model)
    resume_from = find_resume(directory, order.stage, is_main)
    history = read_metrics(resume_from) if resume_from else []
    trainer.step_log.health.recall(history)
    with finishing_steps():
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    facts = {
        "seconds_earlier": round(sum(line["seconds"] for line in history), 3),
        "new_embedding_rows": num_new_rows,
        "wrapper": trainer.wrapper,
        "attention": model.config._attn_implementation,
        "threads": threads,
    }
    return Fitted(trainer, inputs, layout, facts)


def read_inputs(directory: Path, order: Order) -> Inputs:
    """Everything that can be refused is refused here, before anything is loaded or written."""
    check_tracker(order.how.get("report_to", "tensorboard"))
    keep_last = (order.how.get("checkpoint") or {}).get("keep_last", 2)
    init, prepared = resolve_init(order), Path(order.inputs["rows"])
    check_init(init, order.what["seq_len"], directory, keep_last, order.how["precision"])
    said = read_artifact(prepared)["counts"]
    tokenizer, new_tokens = load_tokenizer(prepared / "tokenizer", init, said.get("added_tokens", []))
    rows = load_rows(prepared / "rows.arrow", filler_token=end_token(tokenizer))
    return Inputs(init, tokenizer, new_tokens, rows, said)


def assemble(
    directory: Path, order: Order, backend: ModuleType, config: Any, inputs: Inputs, layout: Layout, model: Any
) -> RowTrainer:
    """The trainer with its rows, its log and its backend."""
    precision = precision_policy(order.how["precision"])
    backend.before_trainer(config, precision)
    seq_len = order.what["seq_len"]
    attention = attention_plan(model.config._attn_implementation, config.device.type, precision.computes_bf16)
    fill_to = layout.microbatch_rows * seq_len if order.how.get("compile", False) else 0
    sums = StepSums(inputs.said["sources"], config.device)
    health = Health(order.what, order.how, layout, Path(order.inputs["rows"]) / "rows.arrow")
    step_log = StepLog(directory, order.stage, layout.num_steps, sums, health, order.how, is_main=backend.rank() == 0)
    trainer = RowTrainer(
        model=model,
        args=config,
        train_dataset=inputs.rows,
        data_collator=make_collate(attention, fill_to, longest=seq_len),
        processing_class=inputs.tokenizer,
        callbacks=[step_log],
        optimizer_cls_and_kwargs=precision.optimizer(order.what, ADAM_EPSILON),
        what=order.what,
        layout=layout,
        step_log=step_log,
        directory=directory,
        backend=backend,
        bf16=precision.computes_bf16,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def save(directory: Path, inputs: Inputs, trainer: RowTrainer, tensors: Iterable[tuple[str, Any]]) -> float | None:
    """Export, and close the metrics; the share of weights that moved, if it can be told."""
    stops = stop_ids(inputs.tokenizer, inputs.said)
    folder = export.export_model(directory, trainer.model, inputs.tokenizer, tensors, stops)
    moved = export.moved_share(inputs.init, folder, getattr(trainer.model, "base_model_prefix", ""))
    assert trainer.step_log.metrics is not None
    trainer.step_log.metrics.close(**({} if moved is None else {"weights_moved_share": moved}))
    return moved


def plan_layout(what: dict[str, Any], how: dict[str, Any], num_rows: int, world_size: int) -> Layout:
    """How this machine spreads the rows of a step; which rows a step holds does not depend on it."""
    rows_per_step = what["batch_tokens"] // what["seq_len"]
    if rows_per_step < 1:
        raise UserError(f"batch_tokens is {what['batch_tokens']}, less than one row of {what['seq_len']} tokens",
                        where="batch_tokens", allowed=f"{what['seq_len']} and more")  # fmt: skip
    return Layout(num_rows, rows_per_step, how.get("microbatch_rows", 1), world_size)


def find_resume(directory: Path, stage: str, is_main: bool) -> Path | None:
    """The newest whole checkpoint, as rank 0 sees it, and the metrics as they were there.

    Leftovers of a killed run are removed.
    """
    found: list[Path | None] = [None]
    if is_main:
        checkpoint.clear_unfinished(directory)
        export.clear_unfinished(directory)
        found = [checkpoint.newest_whole(directory)]
        if newest := found[0]:
            restore_metrics(directory, newest)
    if dist.is_initialized():
        dist.broadcast_object_list(found, src=0)
    if is_main and found[0] is not None:
        step = checkpoint.step_of(found[0])
        say(f"{stage:<14}resuming from the checkpoint of step {step}")
        write_json(directory / RESUMES, [*read_resumes(directory), step])
    return found[0]


def restore_metrics(directory: Path, newest: Path) -> None:
    """Put the metrics back as they were at a checkpoint."""
    if steps_logged(newest) != checkpoint.step_of(newest):
        raise UserError(f"the checkpoint holds no {METRICS} of all its steps: an earlier version saved it",
                        where=str(newest), todo="start the stage over with --force")  # fmt: skip
    write_text(directory / METRICS, (newest / METRICS).read_text())


def read_resumes(directory: Path) -> list[int]:
    """The steps that this stage was resumed from so far, as far as can be read: nothing but a report hangs on it."""
    said = read_json(directory / RESUMES)
    return [step for step in said if isinstance(step, int)] if isinstance(said, list) else []


def count(directory: Path, layout: Layout) -> dict[str, Any]:
    """The counts of a finished stage, over all its processes and resumptions."""
    lines = read_metrics(directory)
    assert [line["step"] for line in lines] == list(range(1, layout.num_steps + 1)), "steps are missing or double"
    tokens, seconds = sum(line["tokens"] for line in lines), sum(line["seconds"] for line in lines)
    skipped = [line for line in lines if "skipped" in line]
    losses = [line["loss"] for line in lines if "skipped" not in line]
    if not losses:
        raise UserError("every step was skipped: nothing was learned", where=str(directory / METRICS))
    return {
        "steps": layout.num_steps,
        "tokens": tokens,
        "supervised_tokens": sum(line["supervised_tokens"] for line in lines),
        "skipped_steps": [line["step"] for line in skipped],
        "skipped_tokens": sum(line["tokens"] for line in skipped),
        "first_loss": losses[0],
        "final_loss": losses[-1],
        "tokens_per_second": round(tokens / seconds, 1),
        "seconds_training": round(seconds, 3),
        "resumed_from": read_resumes(directory),
    }


def stop_ids(tokenizer: Any, said: dict[str, Any]) -> list[int]:
    """The tokens that end a document and, where the rows hold chats, an assistant's turn."""
    turn = said.get("end_of_turn")
    return [end_token(tokenizer), *([turn["id"]] if turn else [])]


def end_token(tokenizer: Any) -> int:
    """The token of filler rows."""
    return int(tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0)
