"""TRL's SFTTrainer on ready rows, with everything said explicitly: no default of a library decides what is
learned.

The subclass changes five things: rows come in their prepared order, the loss has one denominator a step,
the schedule ends at its floor, a checkpoint is written aside and for any number of processes
(`tasks.training.states`), and TRL's own metrics (entropy and accuracy of every token) are not computed.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler
from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]

from tasks.training import checkpoint
from tasks.training.callbacks import StepLog
from tasks.training.isolation import check_isolation, needs_probe
from tasks.training.loss import token_losses
from tasks.training.precision import Precision
from tasks.training.rows import Layout, StepSampler
from tasks.training.schedule import lr_factor
from tasks.training.states import load_states, save_states

ADAM_EPSILON = 1e-8


class RowTrainer(SFTTrainer):
    """SFTTrainer for packed rows; `step_log` is the callback that also holds the step's sums."""

    def __init__(
        self,
        *args: Any,
        what: dict[str, Any],
        layout: Layout,
        step_log: StepLog,
        directory: Path,
        backend: ModuleType,
        bf16: bool,
        **kwargs: Any,
    ) -> None:
        self.what, self.layout, self.step_log, self.directory = what, layout, step_log, directory
        self.backend, self.bf16, self.wrapper = backend, bf16, ""
        self.grouped: list[list[torch.Tensor]] = []  # the optimizer's parameters
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # our loss divides by the whole step; nobody else divides it again

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return StepSampler(self.layout)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        was_empty = self.backend.shard(self.model, self.accelerator)
        prepared = super()._prepare_for_training(*args, **kwargs)
        if was_empty and self.optimizer is not None:
            # accelerate finds parameters by their address, and takes all that have no row here for one.
            for group, parameters in zip(self.optimizer.param_groups, self.grouped, strict=True):
                group["params"] = parameters
        self.wrapper = self.backend.check_wrapper(self.model)  # before a step is spent on the wrong one
        if needs_probe(prepared[0].config):
            check_isolation(prepared[0], lambda rows: self._prepare_inputs(self.data_collator(rows)), self.bf16)
        return prepared

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own; what is in its groups is kept."""
        optimizer = super().create_optimizer(*args, **kwargs)
        self.grouped = [list(group["params"]) for group in optimizer.param_groups]
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """The schedule of `tasks.training.schedule`."""
        assert num_training_steps == self.layout.num_steps, (num_training_steps, self.layout)
        warmup, floor = self.what["warmup_ratio"], self.what["min_lr_ratio"]
        self.lr_scheduler = LambdaLR(
            optimizer or self.optimizer,  # type: ignore[arg-type]
            lambda step: lr_factor(step, num_training_steps, warmup, floor),
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Sum over this micro-batch's targets, divided by all targets of the step on all processes."""
        assert num_items_in_batch is not None and not return_outputs
        total, losses = token_losses(model, inputs)  # scalar, (N,)
        self.step_log.sums.add(losses, inputs["target_sources"], inputs["num_tokens"])
        # Gradients are averaged over processes: times their number makes it the sum that we want.
        loss: torch.Tensor = total / num_items_in_batch.clamp(min=1) * self.accelerator.num_processes
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        grad_norm = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm
        self.step_log.grad_norm = float(grad_norm)
        return grad_norm

    def _get_output_dir(self, trial: Any) -> str:
        return str(checkpoint.writing_folder(self.directory))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.is_world_process_zero():
            checkpoint.clear_unfinished(self.directory)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            assert self.step_log.metrics is not None
            self.step_log.metrics.save(checkpoint.written_folder(self.directory, self.state.global_step))
            checkpoint.publish(self.directory, self.state.global_step, self.step_log.keep_last)
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Nothing: a checkpoint's weights lie with its states, and the export is not the trainer's."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_states(Path(output_dir), self.model, self.optimizer, self.lr_scheduler)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the weights are read with the states."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_states(Path(checkpoint), self.model, self.optimizer, self.lr_scheduler)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No model card in a checkpoint."""


def make_config(
    directory: Path, what: dict[str, Any], layout: Layout, precision: Precision, backend_settings: dict[str, Any]
) -> SFTConfig:
    """Every setting that decides what is learned, and every one that would talk to someone."""
    settings: dict[str, Any] = {
        "output_dir": str(checkpoint.writing_folder(directory)),
        # batches
        "num_train_epochs": 1,
        "max_steps": -1,
        "per_device_train_batch_size": layout.microbatch_rows,
        "gradient_accumulation_steps": layout.accumulation,
        "average_tokens_across_devices": True,
        "dataloader_drop_last": False,
        "dataloader_num_workers": 0,
        "remove_unused_columns": False,
        # our rows are ready
        "packing": False,
        "padding_free": False,
        "max_length": None,
        "completion_only_loss": False,
        "assistant_only_loss": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        # optimizer
        "learning_rate": what["learning_rate"],
        "weight_decay": what["weight_decay"],
        "adam_beta1": what["adam_betas"][0],
        "adam_beta2": what["adam_betas"][1],
        "adam_epsilon": ADAM_EPSILON,
        "max_grad_norm": what["max_grad_norm"],
        "lr_scheduler_type": "constant",  # replaced by create_scheduler
        "warmup_steps": 0,
        # loss and memory
        "loss_type": "nll",
        "use_liger_kernel": False,
        "gradient_checkpointing": False,
        "activation_offloading": False,
        "torch_compile": False,
        # what is said and kept is ours
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "push_to_hub": False,
        "seed": what["seed"],
        "data_seed": what["seed"],
    }
    return SFTConfig(**(settings | precision.trainer_settings | backend_settings))
