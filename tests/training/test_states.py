"""Weights, moments and schedule through a checkpoint that lacks the moments of what no step has reached yet."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.optim.lr_scheduler import LambdaLR

from tasks.errors import UserError
from tasks.training.metrics import METRICS, read_metrics
from tasks.training.states import STATE, list_moments, load_states, save_states
from tests.training.conftest import make_prepared, make_stage, train_here, weights
from tests.training.test_health import SKIP, poisoned, rows_with_poison, same

__all__ = ["poisoned"]  # a fixture
LATE = "late.weight"


class TwoParts(torch.nn.Module):
    """`late` gets no gradient in the first steps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.early, self.late = torch.nn.Linear(4, 3, bias=False), torch.nn.Linear(4, 3, bias=False)

    def step(self, optimizer: Any, scheduler: Any, number: int, parts: str) -> None:
        """One step of the optimizer with a gradient for those parts."""
        for name, parameter in self.named_parameters():
            parameter.grad = torch.full_like(parameter, 0.1 * number) if name.split(".")[0] in parts else None
        optimizer.step()
        scheduler.step()


def start() -> tuple[TwoParts, torch.optim.AdamW, LambdaLR]:
    model = TwoParts()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))


def stored(folder: Path) -> set[str]:
    return set(FileSystemReader(folder / STATE).read_metadata().state_dict_metadata)


def names(model: Any, optimizer: Any) -> set[str]:
    return {moment.name for moment in list_moments(model, optimizer)}


@pytest.mark.parametrize("reached", ["early", ""], ids=["one of two", "none"])
def test_moments_that_a_checkpoint_does_not_hold_are_made_by_their_first_step(tmp_path: Path, reached: str) -> None:
    model, optimizer, scheduler = start()
    for number in (1, 2):
        model.step(optimizer, scheduler, number, reached)
    save_states(tmp_path, model, optimizer, scheduler)
    moments = {f"optimizer.early.weight.{state}" for state in ("step", "exp_avg", "exp_avg_sq")} if reached else set()
    assert stored(tmp_path) == {"model.early.weight", "model.late.weight"} | moments

    other, its_optimizer, its_scheduler = start()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    load_states(tmp_path, other, its_optimizer, its_scheduler)
    assert names(other, its_optimizer) == moments, "zeros that were made to load into are no states"
    for number in (3, 4, 5):
        model.step(optimizer, scheduler, number, "early late")
        other.step(its_optimizer, its_scheduler, number, "early late")
    assert its_optimizer.state[other.late.weight]["step"] == 3, "the step that made the zeros does not count"
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name]), name


class Deed:
    """Done by whoever unpickles it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("craft", ["in place of it", "within it", "as bytes"])
def test_a_checkpoint_runs_no_code(tmp_path: Path, craft: str) -> None:
    """Whoever can write to a shared `runs/` can write digests too: nothing but the reader stands in between."""
    model, optimizer, scheduler = start()
    model.step(optimizer, scheduler, 1, "early late")
    save_states(tmp_path, model, optimizer, scheduler)
    file, mark = tmp_path / STATE / ".metadata", tmp_path / "mark"
    deed: Any = Deed(mark)
    if craft != "in place of it":
        metadata = FileSystemReader(tmp_path / STATE).read_metadata()
        if craft == "within it":
            metadata.planner_data = deed
        else:  # what torch.distributed.checkpoint reads with `weights_only=False`
            metadata.state_dict_metadata["model.early.weight"] = BytesStorageMetadata()
            [shard] = file.parent.glob("*.distcp")
            torch.save(deed, shard)
            for index, info in metadata.storage_data.items():
                if index.fqn == "model.early.weight":
                    info.offset, info.length = 0, shard.stat().st_size
        deed = metadata
    file.write_bytes(pickle.dumps(deed))
    with pytest.raises(UserError, match=r"describes no tensor") as refused:
        load_states(tmp_path, *start())
    assert refused.value.where == str(file) and not mark.exists()
    pickle.loads(pickle.dumps(Deed(mark)))
    assert mark.exists(), "the deed is one"


def test_a_training_resumes_from_a_checkpoint_before_its_first_real_step(
    tmp_path: Path, poisoned: tuple[Path, Path]
) -> None:
    """The first step was left out (`on_nan: skip`): the checkpoint behind it holds no moment."""
    prepared = make_prepared(tmp_path / "prepare_cpt-bad", rows_with_poison(0))
    undisturbed, resumed = (make_stage(tmp_path / runs, poisoned[0], prepared, SKIP) for runs in ("a", "b"))
    train_here(undisturbed)
    assert "skipped" in read_metrics(undisturbed)[0]
    first = Path("checkpoints/checkpoint-00000001")
    assert not [name for name in stored(undisturbed / first) if name.startswith("optimizer.")]
    assert [name for name in stored(undisturbed / "checkpoints/checkpoint-00000002") if name.startswith("optimizer.")]

    shutil.copytree(undisturbed / first, resumed / first)
    (resumed / METRICS).write_text((undisturbed / METRICS).read_text().split("\n")[0] + "\n")
    assert train_here(resumed)["resumed_from"] == [1]
    ours, theirs = weights(resumed), weights(undisturbed)
    assert ours.keys() == theirs.keys() and all(same(ours[name], theirs[name]) for name in ours)
    assert [line["loss"] for line in read_metrics(resumed)] == [line["loss"] for line in read_metrics(undisturbed)]
