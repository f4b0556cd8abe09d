"""Moments in 8 bits through a checkpoint, between one process and two.

torchao comes with the extra `gpu`; without it there is nothing to test. Slow: eight starts of torch and torchao.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn
from torch.optim.lr_scheduler import LambdaLR

from tasks.room import checkpoint_bytes
from tasks.training.moments import as_part
from tasks.training.states import list_moments, load_states, save_states

pytest.importorskip("torchao")
# Two processes cut "halves" within a block: they keep it in bf16.
SHAPES = {"rows": (64, 256), "odd": (96, 128), "vector": (8192,), "tiny": (100,), "uneven": (33, 512),
          "halves": (66, 128), "many": (768, 96)}  # fmt: skip
RATE = 1e-3


class Weights(torch.nn.Module):
    """Parameters of all the shapes that matter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, shape in SHAPES.items():
            self.register_parameter(name, torch.nn.Parameter(torch.randn(shape).bfloat16()))

    def loss(self, step: int) -> torch.Tensor:
        """One whose gradients differ from element to element and from step to step."""
        losses = [((p.float() + step) * torch.linspace(-1, 1, p.numel()).view(p.shape)).square().sum()
                  for p in self.parameters()]  # fmt: skip
        return torch.stack(losses).sum()


def start(rank: int, world_size: int, meeting: Path) -> Any:
    """Model, optimizer and schedule, sharded over several processes."""
    from tasks.training.stochastic import StochasticAdamW8bit

    torch.compiler.set_stance("force_eager")
    model = Weights()
    if world_size > 1:
        dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=world_size)
        fully_shard(model)
    optimizer = StochasticAdamW8bit(model.parameters(), lr=RATE)
    return model, optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))


def whole(model: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    """Every weight and every state as float32, gathered."""
    found = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for moment in list_moments(model, optimizer):
        local = moment.local.dequantize(torch.float32) if moment.quantized else moment.local
        found[moment.name] = as_part(local, moment.parameter) if moment.value.ndim else local
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t.clone() for name, t in found.items()}


def train_and_save(rank: int, world_size: int, folder: Path) -> None:
    """Three steps, a checkpoint, and what it should hold."""
    model, optimizer, scheduler = start(rank, world_size, folder / "saving")
    inputs = Weights()
    for step in range(3):
        inputs.zero_grad()
        inputs.loss(step).backward()
        for parameter, given in zip(model.parameters(), inputs.parameters(), strict=True):
            parameter.grad = given.grad if world_size == 1 else cut(given.grad, parameter)
        optimizer.step()
        scheduler.step()
    quantized = {moment.name.split(".")[1] for moment in list_moments(model, optimizer) if moment.quantized}
    assert quantized == {"rows", "odd", "uneven", "vector", "many"} | ({"halves"} if world_size == 1 else set())
    save_states(folder, model, optimizer, scheduler)
    if rank == 0:
        torch.save(whole(model, optimizer) if world_size == 1 else None, folder / "alone.pt")
    if world_size > 1:
        torch.save(whole(model, optimizer), folder / f"together{rank}.pt")


def cut(gradient: Any, parameter: Any) -> Any:
    """A whole gradient as the parameter is sharded."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(gradient, parameter.device_mesh, parameter.placements)


def load_and_keep(rank: int, world_size: int, folder: Path) -> None:
    """A fresh optimizer takes the checkpoint over."""
    model, optimizer, scheduler = start(rank, world_size, folder / "loading")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_states(folder, model, optimizer, scheduler)
    assert optimizer.param_groups[0]["lr"].item() == pytest.approx(RATE / 4)
    assert all(parameter.grad is None for parameter in model.parameters())
    found = whole(model, optimizer)
    if rank == 0:
        torch.save(found, folder / "loaded.pt")


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (1, 2), (2, 1)])
def test_8_bit_moments_survive_a_change_of_processes(tmp_path: Path, before: int, after: int) -> None:
    spawn(train_and_save, (before, tmp_path), before)
    spawn(load_and_keep, (after, tmp_path), after)
    saved = torch.load(tmp_path / ("alone.pt" if before == 1 else "together0.pt"))
    loaded = torch.load(tmp_path / "loaded.pt")
    assert saved.keys() == loaded.keys() and len(saved) == 4 * len(SHAPES)
    assert saved["optimizer.rows.exp_avg"].abs().max() > 0 and saved["optimizer.rows.step"] == 3
    parameters = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    stored = sum(file.stat().st_size for file in (tmp_path / "state").glob("*.distcp"))
    assert stored < 1.4 * checkpoint_bytes(parameters, "bf16-stochastic"), "more than the plan of the disk says"
    for name, tensor in saved.items():
        if before == after or "halves.exp" not in name:
            assert torch.equal(loaded[name], tensor), name
        else:
            one, other = loaded[name].float(), tensor.float()
            assert torch.allclose(one, other, rtol=0.1, atol=float(other.abs().max()) / 100), name
