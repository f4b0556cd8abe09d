"""What training takes of a node's own memory, and how much of it a container or a batch job leaves us."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from flows import pipeline as flow
from tasks import host
from tasks.choose import Job, choose
from tasks.forecast import missing_for
from tasks.hardware import load_hardware
from tasks.host import host_bytes, pinned_bytes, power_of_two, usable_bytes
from tasks.memory import GIB, Setting, setting_of
from tasks.model_shape import shape_of
from tasks.speed import MEASUREMENTS
from tests.conftest import edit
from tests.tasks.test_memory import LLAMA_8B
from tests.tasks.test_model_shape import PUBLISHED

LLAMA_70B = shape_of(PUBLISHED["Llama 3.1 70B"][0])
SHARDED = Setting("fsdp", "fp32-master", "full", 1, 4096, world_size=8)
OFFLOADED = replace(SHARDED, offload="cpu")


@pytest.mark.parametrize(("size", "taken"), [(1, 1), (3, 4), (1024, 1024), (1025, 2048), (29_360_128, 2**25)])
def test_pinned_memory_comes_in_powers_of_two(size: int, taken: int) -> None:
    assert power_of_two(size) == taken


def test_what_is_pinned_is_counted_tensor_by_tensor() -> None:
    """Llama 3 8B over eight: all widths are powers of two but the MLP's 14,336, of which a shard is 7/8 of one."""
    exact = 4.0 * LLAMA_8B.parameters / 8
    mlp = 3 * 32 * (2**25 - 14_336 * 4096 * 4 / 8)
    ends = 2 * (2**28 - 128_256 * 4096 * 4 / 8)
    assert pinned_bytes(LLAMA_8B, 8, 4.0) == pytest.approx(exact + mlp + ends, rel=1e-3)
    assert pinned_bytes(LLAMA_8B, 8, 4.0) > 1.08 * exact
    one, many = host_bytes(LLAMA_8B, OFFLOADED, 8), host_bytes(LLAMA_8B, replace(OFFLOADED, world_size=16), 8)
    assert one > 16 * LLAMA_8B.parameters + 8 * host.PROCESS_BYTES and many < 0.6 * one


def test_loading_by_shards_takes_no_copy_of_the_model() -> None:
    """The case that this is for: eight copies of 70B in float32 are 2 TiB, which no plan said."""
    sharded = host_bytes(LLAMA_70B, SHARDED, 8)
    assert sharded < 8 * host.PROCESS_BYTES + host.SPARE_BYTES + 16 * GIB < 4.0 * LLAMA_70B.parameters
    alone = host_bytes(LLAMA_8B, replace(SHARDED, world_size=1), 1)
    assert 4.0 * LLAMA_8B.parameters < alone < 4.0 * LLAMA_8B.parameters + 12 * GIB
    assert host_bytes(LLAMA_8B, replace(SHARDED, backend="unsloth", world_size=1), 1) < 12 * GIB


def test_unsloths_inputs_of_layers_lie_on_the_host() -> None:
    long = Setting("unsloth", "fp32-master", "unsloth", 1, 65_536)
    moved = host_bytes(LLAMA_8B, long, 1) - host.PROCESS_BYTES - host.SPARE_BYTES
    assert moved == 32 * 65_536 * 4096 * 4


def test_what_processes_held_on_hosts_of_h200s_was_planned() -> None:
    rows = json.loads((MEASUREMENTS / "h200.json").read_text())["rows"]
    held = [row for row in rows if row["tool"] == "steep" and "host_gib" in row]  # of the first process
    assert len(held) > 20
    for row in held:
        processes = row.get("processes", 1)
        planned = host_bytes(shape_of(row["model"]["config"]), setting_of(row), processes) / GIB
        assert row["host_gib"] <= planned, row["name"]


def test_a_choice_says_what_its_node_gives() -> None:
    row = load_hardware("2x8xh100-80gb").model_copy(update={"offload": "cpu", "recompute": "full"})
    chosen = choose("2x8xh100-80gb", row, Job(LLAMA_8B, 4096, 64))
    assert chosen.host_gib == pytest.approx(host_bytes(LLAMA_8B, chosen.setting, 8) / GIB)  # type: ignore[arg-type]


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Control groups of our own making."""
    monkeypatch.setattr(host, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(host, "OWN_CGROUPS", tmp_path / "own")
    return tmp_path


def limit(groups: Path, folder: str, name: str, text: str) -> None:
    (groups / "cgroup" / folder).mkdir(parents=True, exist_ok=True)
    (groups / "cgroup" / folder / name).write_text(text + "\n")


def test_a_container_or_a_job_bounds_what_we_may_use(groups: Path) -> None:
    there = usable_bytes()
    assert there > 2**30
    (groups / "own").write_text("0::/slurm/job_7/step_0\n")
    limit(groups, "slurm/job_7/step_0", "memory.max", "max")
    assert usable_bytes() == there
    limit(groups, "slurm/job_7", "memory.max", str(2**28))  # the job's, around our step's
    assert usable_bytes() == 2**28
    (groups / "own").write_text("9:name=systemd:/\n4:cpu,memory:/docker/abc\n0::/\n")  # the older kind
    limit(groups, "memory", "memory.limit_in_bytes", str(2**27))  # a container's own view: its group is the root
    assert usable_bytes() == 2**27
    limit(groups, "memory/docker/abc", "memory.limit_in_bytes", str(2**26))
    assert usable_bytes() == 2**26


def test_a_run_that_its_host_cannot_hold_is_refused(
    project: Path, groups: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(project, "hardware: cpu", "hardware: 2xh200")
    script = groups / "bin" / "nvidia-smi"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\nfor i in 0 1; do echo $i, GPU-$i, NVIDIA H200, 143771; done\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    plan = flow.load_plan(str(project / "run.yaml"), None)
    assert missing_for(plan, ["cpt", "sft"]) is None
    (groups / "own").write_text("0::/\n")
    limit(
        groups, "", "memory.max", str(8 * 2**30)
    )  # two processes of 2 GiB and what is spared, before anything is loaded
    text = str(missing_for(plan, ["cpt", "sft"]))
    assert "the training takes 9 GiB of this machine's own memory (2 processes), of which we may use 8" in text
