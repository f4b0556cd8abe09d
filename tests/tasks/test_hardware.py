"""Hardware tags: every shipped row holds, and rows that contradict themselves are refused with the key to change."""

from pathlib import Path

import pytest
import yaml

from tasks.errors import UserError
from tasks.hardware import HARDWARE_FILE, load_hardware

TAGS = list(yaml.safe_load(HARDWARE_FILE.read_text()))
ASKED_FOR = {
    "cpu",
    "cpu-x2",
    "1x24gb",
    "1xa100-80gb",
    "1xh200",
    "2xh200",
    "8xa100-80gb",
    "8xh100-80gb",
    "2x8xh100-80gb",
}
GPU = "device: cuda, card: h200, memory_gib: 139"


def test_the_tags_that_users_know_stand_there() -> None:
    assert set(TAGS) >= ASKED_FOR


@pytest.mark.parametrize("tag", TAGS)
def test_one_gpu_trains_with_unsloth_and_several_with_fsdp(tag: str) -> None:
    row = load_hardware(tag)
    one_gpu = row.device == "cuda" and row.world_size == 1 and not tag.endswith("-fsdp")
    assert row.backend == ("unsloth" if one_gpu else "fsdp")
    pool = "cpu" if row.device == "cpu" else "gpu-single" if row.world_size == 1 else "gpu-multi"
    assert row.work_pool == pool


# (the row, what the message must say)
BAD = {
    "unsloth on a CPU": ("backend: unsloth, device: cpu", ["box.backend", "needs a GPU", "use fsdp"]),
    "unsloth on two GPUs": (f"backend: unsloth, {GPU}, processes: 2", ["box.backend", "one GPU, this row has 2"]),
    "unsloth on two nodes": (f"backend: unsloth, {GPU}, nodes: 2", ["box.backend", "one GPU, this row has 2"]),
    "Unsloth's recompute elsewhere": (f"backend: fsdp, {GPU}, recompute: unsloth", ["box.recompute", "selective"]),
    "pointwise, not compiled": (
        f"backend: fsdp, {GPU}, recompute: pointwise, precision: fp32",
        ["box.recompute", "not compiled"],
    ),
    "pointwise, told not to compile": (
        f"backend: fsdp, {GPU}, recompute: pointwise, compile: false",
        ["box.recompute", "not compiled"],
    ),
    "offload with unsloth": (f"backend: unsloth, {GPU}, offload: cpu", ["box.offload", "backend fsdp"]),
    "offload on a CPU": ("backend: fsdp, device: cpu, offload: cpu", ["box.offload", "device cuda"]),
    "8-bit states on the host": (
        f"backend: fsdp, {GPU}, offload: cpu, precision: bf16-stochastic",
        ["box.precision", "fp32-master"],
    ),
    "no memory": ("backend: fsdp, device: cuda, card: h200", ["'memory_gib'"]),
    "no rows": (f"backend: fsdp, {GPU}, microbatch_rows: 0", ["box.microbatch_rows", "1 or more, or auto"]),
    "a word for rows": (f"backend: fsdp, {GPU}, microbatch_rows: many", ["box.microbatch_rows"]),
    "an old name": (
        "backend: fsdp, device: cuda, memory_gb: 139",
        ["unknown key 'memory_gb'", "did you mean 'memory_gib'"],
    ),
    "a precision nobody knows": (
        f"backend: fsdp, {GPU}, precision: bf17",
        ["box.precision", "'bf17'", "bf16-stochastic"],
    ),
    "a meeting of one": (f"backend: fsdp, {GPU}, rendezvous: 'a:1'", ["box.rendezvous", "several nodes"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_row_that_contradicts_itself_is_refused(tmp_path: Path, case: str) -> None:
    row, said = BAD[case]
    path = tmp_path / "hardware.yaml"
    path.write_text(f"other: {{backend: fsdp, device: cpu}}\nbox: {{{row}}}\n")
    with pytest.raises(UserError) as caught:
        load_hardware("box", path)
    assert [text for text in [*said, f"{path}:2"] if text not in str(caught.value)] == [], str(caught.value)
