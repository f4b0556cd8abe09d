"""What the training stages of a plan will take: settings, memory by parts, speed, time, disk. And what is missing here.

`lines` is what `make plan` and the first lines of every run print; `preflight` refuses before anything starts.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tasks.cards import matrix_flops
from tasks.disk import free_bytes
from tasks.errors import UserError
from tasks.hardware import Hardware
from tasks.machine import gpus, missing_here
from tasks.memory import GIB
from tasks.plan import Planned
from tasks.room import check_disk, stage_bytes
from tasks.speed import MEAN_CONTEXT
from tasks.stage import ARTIFACT, read_artifact
from tasks.training.trackers import missing_tracker

INDENT = " " * 7
FEW_STEPS = 20  # warmup and decay of the learning rate are a step or two then
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


def lines(plan: dict[str, Planned], wanted: Iterable[str] | None = None, reused: bool = False) -> list[str]:
    """Three lines for each training stage that will run; one on a CPU, where nothing is predicted.

    With `reused`, also what those would take that stand.
    """
    return [line for planned in _trainings(plan, wanted, reused) for line in _stage_lines(planned)]


def preflight(plan: dict[str, Planned], wanted: Iterable[str]) -> None:
    """Refuse what would fail later: GPUs or packages that are not here, a disk that is too small."""
    if missing := missing_for(plan, wanted):
        raise missing
    for planned in _trainings(plan, wanted):
        if planned.choice and planned.choice.job:
            parameters = planned.choice.job.shape.parameters
            check_disk(planned.directory, parameters, planned.order.how["precision"], _keep_last(planned))


def missing_for(plan: dict[str, Planned], wanted: Iterable[str]) -> UserError | None:
    """What this machine lacks for the trainings and evaluations that will run."""
    todo = [plan[name] for name in wanted if plan[name].group in ("cpt", "sft", "evaluate") and not plan[name].reused]
    hows, choices = [p.order.how for p in todo], [p.choice for p in todo if p.choice]
    missing = None
    if choices:
        missing = missing_here(hows[0]["tag"], choices[0].hardware, hows, max(choice.host_gib for choice in choices))
    for how in (p.order.how for p in todo if p.order.kind == "train"):
        missing = missing or missing_tracker(how["report_to"])
    return missing or _missing_for_evaluation(plan, [p.order.how for p in todo if p.group == "evaluate"])


def _missing_for_evaluation(plan: dict[str, Planned], hows: list[dict[str, Any]]) -> UserError | None:
    """Evaluation holds a whole model on one GPU, whatever trained it: in float32, or in bf16 where only that fits."""
    if not hows or hows[0]["device"] != "cuda":
        return None
    how, where = hows[0], f"hardware tag {hows[0]['tag']}"
    if not gpus():
        return UserError("evaluation needs a GPU, and nvidia-smi shows none that we may use here", where=where,
                         todo="run it where the GPU is, or take --hardware cpu")  # fmt: skip
    shapes = [p.choice.job.shape for p in plan.values() if p.choice and p.choice.job]
    dtype = how["dtype"]
    needed_gib = max((DTYPE_BYTES[dtype] * shape.parameters / GIB for shape in shapes), default=0.0)
    if needed_gib < how["memory_gib"]:
        return None
    return UserError(
        f"evaluation holds the model in {dtype} on one GPU: {needed_gib:.1f} of {how['memory_gib']:g} GiB",
        where=where,
        todo="train with --until sft, and evaluate elsewhere: --hardware with a larger GPU, or cpu",
    )


def rows_for_table(plan: dict[str, Planned]) -> list[dict[str, Any]]:
    """One row a training stage, for a table in Prefect's UI."""
    return [_table_row(planned) for planned in _trainings(plan, None)]


# --- one stage --------------------------------------------------------------------------------------------------------


def _trainings(plan: dict[str, Planned], wanted: Iterable[str] | None, reused: bool = False) -> list[Planned]:
    names = set(plan if wanted is None else wanted)
    trainings = [p for name, p in plan.items() if name in names and p.order.kind == "train" and p.choice]
    return [p for p in trainings if reused or not p.reused]


def _stage_lines(planned: Planned) -> list[str]:
    choice, how = planned.choice, planned.order.how
    assert choice is not None
    num_steps, again = _num_steps(planned), "stands; again on " if planned.reused else ""
    head = f"{planned.stage:<7}{again}{how['tag']}: {choice.say()}{_say_steps(planned, num_steps)}"
    few = [f"{INDENT}so few steps hardly train: lower batch_tokens, or raise the budget"]
    few = few if num_steps and num_steps < FEW_STEPS else []
    if choice.parts is None:
        return [f"{head}; {_disk(planned)}", *few]
    parts = " + ".join(f"{name} {gib:.1f}" for name, gib in choice.parts.as_gib().items())
    return [
        f"{head}; {choice.gib:.1f} of {choice.hardware.memory_gib:g} GiB a GPU",
        f"{INDENT}{parts} GiB (at the {choice.parts.moment})" + _host_memory(planned),
        f"{INDENT}{_time(planned)}; {_disk(planned)}",
        *few,
    ]


def _host_memory(planned: Planned) -> str:
    choice = planned.choice
    assert choice is not None
    return f"; {choice.host_gib:,.0f} GiB of each node's memory" if choice.host_gib else ""


def _time(planned: Planned) -> str:
    choice = planned.choice
    assert choice is not None
    assert choice.job is not None
    if choice.speed is None or choice.hardware.card is None:
        return "no time predicted: the card is not in tasks/cards.py"
    if choice.hardware.offload != "none":
        return "no time predicted: what offloading costs was never measured"
    rate, tokens = choice.speed.tokens_per_second, _tokens(planned)
    mfu = _mfu(choice.hardware, choice.job.shape.flops_per_token(MEAN_CONTEXT), rate)
    lasts = f"{tokens:,} tokens in {say_time(tokens / rate)}" if tokens else "time known once its rows are prepared"
    return f"{rate:,.0f} tokens/s predicted ({mfu:.0%} MFU), {lasts}"


def _mfu(hardware: Hardware, flops_per_token: float, tokens_per_second: float) -> float:
    assert hardware.card is not None
    return tokens_per_second / hardware.world_size * flops_per_token / matrix_flops(hardware.card)


def _tokens(planned: Planned) -> int | None:
    """Of the prepared rows where they stand, else the budget; a budget in epochs says nothing before."""
    if _rows_stand(planned):
        return int(read_artifact(Path(planned.order.inputs["rows"]))["counts"]["tokens"])
    return planned.budget_tokens


def _num_steps(planned: Planned) -> int | None:
    """As the trainer counts them where the rows stand, else at least; a budget in epochs says nothing before."""
    rows, batch_tokens = Path(planned.order.inputs["rows"]), planned.order.what["batch_tokens"]
    if _rows_stand(planned):
        return -(-int(read_artifact(rows)["counts"]["rows"]) * planned.order.what["seq_len"] // batch_tokens)
    return -(-planned.budget_tokens // batch_tokens) if planned.budget_tokens else None


def _say_steps(planned: Planned, number: int | None) -> str:
    least = "" if _rows_stand(planned) else "at least "  # packing leaves a little of a row empty
    return f"; {least}{number:,} step{'s' if number > 1 else ''}" if number else ""


def _rows_stand(planned: Planned) -> bool:
    return (Path(planned.order.inputs["rows"]) / ARTIFACT).is_file()


def _disk(planned: Planned) -> str:
    free = free_bytes(planned.directory) / 1e9
    choice = planned.choice
    if choice is None or choice.job is None:
        return f"{free:,.0f} GB of disk free"
    needed = stage_bytes(choice.job.shape.parameters, planned.order.how["precision"], _keep_last(planned)) / 1e9
    return f"up to {needed:,.1f} GB of disk for checkpoints and export, {free:,.0f} GB free"


def _keep_last(planned: Planned) -> int:
    return int(planned.order.how["checkpoint"]["keep_last"])


def _table_row(planned: Planned) -> dict[str, Any]:
    choice = planned.choice
    assert choice is not None
    row = {"stage": planned.stage, "tag": planned.order.how["tag"], "settings": choice.say(), "disk": _disk(planned)}
    if choice.parts is None:
        return row
    parts = {name: f"{gib:.1f} GiB" for name, gib in choice.parts.as_gib().items()}
    return row | parts | {"of a GPU": f"{choice.gib:.1f} of {choice.hardware.memory_gib:g} GiB", "time": _time(planned)}


def say_time(seconds: float) -> str:
    """`3 d 4 h`, `2 h 10 min`, `45 s`: two units are enough for a prediction."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"
