"""The schema of a run: what a YAML file in `configs/` may say. Frozen, unknown keys refused, no side effects.

`load_config` reads one file into a `Run` and names file, line, key, value and what is allowed when something is wrong.
Where a run happens is said in `tasks/hardware.py`. Units stand in names; a share is a fraction.
Paths are relative to the project's root, from which every command runs; where they may lead says `tasks/roots.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from tasks.hardware import HARDWARE_FILE, Hardware, load_hardware
from tasks.roots import DEFAULT_RUNS, hold_run
from tasks.yaml_file import Misplaced, Section, locate, nearest, read_yaml, validate

__all__ = ["HARDWARE_FILE", "Hardware", "Run", "load_config", "load_hardware", "locate", "nearest"]

Share = Annotated[float, Field(gt=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


def _no_climbing(revision: str) -> str:
    if ".." in revision or revision.startswith("/"):  # git allows neither, and the cache looks it up as a file's name
        raise ValueError(f"'{revision}' is no revision: a branch, a tag or a commit")
    return revision


Revision = Annotated[str, AfterValidator(_no_climbing)]


class Model(Section):
    """The base model: a local folder, or a hub id (never guessed: a hub id needs `hub: true`)."""

    path: str
    hub: bool = False
    revision: Revision | None = None
    seq_len: int = Field(gt=1, description="tokens a packed row")
    chat_template: str | None = Field(None, description="Jinja file, for a tokenizer without a template")
    trust_remote_code: bool | None = Field(None, description="run the code that the model brings (tasks/trust.py)")


class HubDataset(Section):
    """A dataset of the hub."""

    id: str
    subset: str | None = None
    split: str = "train"
    revision: Revision | None = None


class Source(Section):
    """Where data comes from (`files:` or `hf:`) and which fields hold it (exactly one kind of record).

    Documents: `text`. Chats: `messages`, or `prompt` + `completion`, or Alpaca's `instruction` + `input` + `output`, or
    ShareGPT's `conversations`. Each value is the name of a field.
    """

    files: str | list[str] | None = Field(None, description="globs: .jsonl .json .csv .parquet .txt .md, also .gz .zst")
    hf: HubDataset | None = None
    text: str | None = None
    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None
    instruction: str | None = None
    input: str | None = None
    output: str | None = None
    conversations: str | None = None
    min_chars: int = Field(16, ge=1, description="shorter documents are dropped, and counted")

    @property
    def globs(self) -> list[str]:
        """The source's globs; empty for a dataset of the hub."""
        return [self.files] if isinstance(self.files, str) else list(self.files or [])

    @property
    def kind(self) -> Literal["text", "messages", "prompt", "instruction", "conversations"]:
        """The kind of record, named by its leading field."""
        for kind in ("text", "messages", "prompt", "instruction", "conversations"):
            if getattr(self, kind) is not None:
                return kind  # type: ignore[return-value]
        raise AssertionError("checked by _check")

    @model_validator(mode="after")
    def _check(self) -> Source:
        if (self.files is None) == (self.hf is None):
            raise ValueError("a source needs exactly one of 'files' and 'hf'")
        leading = [k for k in ("text", "messages", "prompt", "instruction", "conversations") if getattr(self, k)]
        if len(leading) != 1:
            raise ValueError(
                "a source needs exactly one kind of record: 'text', 'messages', 'prompt' + 'completion', "
                f"'instruction' (+ 'input') + 'output', or 'conversations'; found {leading or 'none'}"
            )
        for field, needs in (("prompt", "completion"), ("completion", "prompt"), ("instruction", "output"),
                             ("output", "instruction"), ("input", "instruction")):  # fmt: skip
            if getattr(self, field) and not getattr(self, needs):
                raise ValueError(f"'{field}' needs '{needs}' beside it")
        # An order holds the default too, and is read with this schema.
        if self.kind != "text" and self.min_chars != type(self).model_fields["min_chars"].default:
            raise Misplaced("'min_chars' is for documents: chats may be short", "min_chars")
        return self


class MaxEpochs(Section):
    """How often a source may repeat to fill its budget."""

    mix: float = Field(4.0, gt=0)
    replay: float = Field(1.0, gt=0)


class Checkpoint(Section):
    """When a checkpoint is saved. Where and when are no part of a stage's identity."""

    every_steps: int | None = Field(None, gt=0)
    every_minutes: float | None = Field(30.0, gt=0)
    keep_last: int = Field(2, ge=1)


class TrainStage(Section):
    """One training stage (`cpt` or `sft`): its data, its budget and its schedule."""

    tokens: int | None = Field(None, gt=0, description="budget of the stage, all sources together")
    epochs: float | None = Field(None, gt=0, description="instead of tokens: passes over `mix`; replay comes on top")
    mix: dict[str, Share] = Field(min_length=1, description="shares of what is not replay; they add up to 1")
    replay: dict[str, Annotated[float, Field(gt=0, lt=1)]] = Field(
        default_factory=dict, description="shares of all tokens of the stage"
    )
    max_epochs: MaxEpochs = MaxEpochs()
    overflow: Literal["error", "drop", "truncate"] = Field("error", description="a conversation longer than a row")
    learning_rate: float = Field(gt=0, lt=1)
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    batch_tokens: int = Field(gt=0, description="tokens an optimizer step, all processes together")
    weight_decay: float = Field(0.0, ge=0)
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    max_grad_norm: float = Field(1.0, gt=0)
    max_loss_spike: float | None = Field(
        None, gt=1, description="a step is broken when its loss exceeds so many times the median of the last 50 steps"
    )
    on_nan: Literal["stop", "skip"] = Field(
        "stop", description="a broken step (loss or gradient not finite, or a spike): end, or leave it out and go on"
    )
    max_skipped: int = Field(10, ge=1, description="broken steps that `on_nan: skip` leaves out of a stage at most")
    checkpoint: Checkpoint = Checkpoint()

    @property
    def replay_share(self) -> float:
        """Replay's share of all tokens of the stage."""
        return sum(self.replay.values())

    @property
    def shares(self) -> dict[str, float]:
        """Every source's share of all tokens of the stage; adds up to 1."""
        rest = 1.0 - self.replay_share
        return {name: share * rest for name, share in self.mix.items()} | dict(self.replay)

    @model_validator(mode="after")
    def _check(self) -> TrainStage:
        if (self.tokens is None) == (self.epochs is None):
            raise ValueError("a stage needs exactly one of 'tokens' and 'epochs'")
        if abs(sum(self.mix.values()) - 1) > 1e-6:
            raise Misplaced(f"the shares of 'mix' add up to {sum(self.mix.values()):g}, not 1", "mix")
        if self.replay_share >= 1:
            raise Misplaced(f"the shares of 'replay' add up to {self.replay_share:g}; they must stay below 1", "replay")
        if both := set(self.mix) & set(self.replay):
            raise Misplaced(f"{sorted(both)} stand in both 'mix' and 'replay'", "replay")
        return self


class Evaluate(Section):
    """lm-eval tasks, run on the base, the CPT model and the SFT model."""

    domain: list[str] = Field(default_factory=list)
    general: list[str] = Field(default_factory=list)
    include_path: str = "configs/lm_eval"
    limit: int | None = Field(None, gt=0, description="examples a task, for a quick look")

    @property
    def tasks(self) -> list[str]:
        """Every task once, domain first."""
        return list(dict.fromkeys([*self.domain, *self.general]))

    @model_validator(mode="after")
    def _check(self) -> Evaluate:
        if not self.tasks:
            raise ValueError("'evaluate' needs at least one task in 'domain' or 'general'")
        if both := [name for name in self.general if name in self.domain]:
            raise Misplaced(f"{both} stand in both 'domain' and 'general', which are judged differently", "general")
        return self


class Gate(Section):
    """What the report's verdict on the last model asks of every metric, against the base, in the metric's own unit."""

    min_domain_gain: float = Field(0.0, allow_inf_nan=False)
    max_general_drop: float = Field(1.0, ge=0, allow_inf_nan=False)


class Run(Section):
    """A run's file."""

    name: Name
    hardware: str = Field(description="a tag: one row of configs/hardware.yaml")
    seed: int = Field(0, ge=0)
    runs_dir: str = DEFAULT_RUNS
    report_to: Literal["tensorboard", "wandb", "mlflow", "trackio"] = Field(
        "tensorboard", description="where a training's curves go, beside metrics.jsonl; recorded, never hashed"
    )
    model: Model
    sources: dict[Name, Source] = Field(min_length=1)
    cpt: TrainStage | None = None
    sft: TrainStage | None = None
    evaluate: Evaluate | None = None
    gate: Gate | None = None

    @property
    def train_stages(self) -> dict[str, TrainStage]:
        """The training stages that this run has, in order."""
        return {name: stage for name, stage in (("cpt", self.cpt), ("sft", self.sft)) if stage}

    @property
    def unused_sources(self) -> list[str]:
        """Sources that no stage names."""
        used = {name for stage in self.train_stages.values() for name in stage.shares}
        return [name for name in self.sources if name not in used]

    @model_validator(mode="after")
    def _check(self) -> Run:
        if not self.train_stages:
            raise ValueError("a run needs 'cpt', 'sft' or both")
        for name, stage in self.train_stages.items():
            for source in stage.shares:
                if source not in self.sources:
                    section = "mix" if source in stage.mix else "replay"
                    raise Misplaced(
                        f"{name}.{section} names '{source}', which is no source{nearest(source, self.sources)} "
                        f"(sources: {', '.join(self.sources)})", name, section, source,
                    )  # fmt: skip
            rows, rest = divmod(stage.batch_tokens, self.model.seq_len)
            if rest:
                fitting = sorted({max(1, rows) * self.model.seq_len, (rows + 1) * self.model.seq_len})
                raise Misplaced(
                    f"{name}.batch_tokens is {stage.batch_tokens}, no multiple of model.seq_len {self.model.seq_len}; "
                    f"the nearest are {' and '.join(map(str, fitting))}", name, "batch_tokens",
                )  # fmt: skip
            if stage.tokens is not None and stage.tokens < stage.batch_tokens:
                raise Misplaced(
                    f"{name}.tokens is {stage.tokens}, less than the {stage.batch_tokens} of one step "
                    f"({name}.batch_tokens): raise the budget, or lower batch_tokens", name, "tokens",
                )  # fmt: skip
        if self.gate:
            self._check_gate(self.gate)
        return self

    def _check_gate(self, gate: Gate) -> None:
        if self.evaluate is None:
            raise Misplaced("'gate' compares what 'evaluate' measures, and this run has no 'evaluate'", "gate")
        for bound, side in (("min_domain_gain", "domain"), ("max_general_drop", "general")):
            if bound in gate.model_fields_set and not getattr(self.evaluate, side):
                raise Misplaced(f"gate.{bound} has nothing to compare: evaluate.{side} names no task", "gate", bound)


def load_config(path: str | Path) -> Run:
    """Read and check a run's file. Raises `UserError` with file, line, key, value and what is allowed."""
    run = validate(Run, read_yaml(Path(path)), Path(path))
    hold_run(run, Path(path))
    return run
