"""What a machine has, told by a fake nvidia-smi on PATH (a real process), against what hardware tags say."""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from flows import pipeline as flow
from tasks import machine
from tasks.errors import UserError
from tasks.forecast import missing_for
from tasks.hardware import load_hardware
from tasks.machine import Gpu, gpus, missing_here, resolve_tag
from tests.conftest import edit

MIB = {"NVIDIA H200": 143_771, "NVIDIA A100-SXM4-80GB": 81_920, "NVIDIA H100 80GB HBM3": 81_559, "NVIDIA GeForce RTX 4090": 24_564,
       "NVIDIA L4": 23_034, "NVIDIA Strange 9000": 49_152}  # fmt: skip
Plug = Callable[..., None]


@pytest.fixture
def plug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plug:
    """Put GPUs into this machine, as far as nvidia-smi is asked."""

    def plug_in(*names: str) -> None:
        lines = "".join(f"{i}, GPU-{i:04d}-aa, {name}, {MIB[name]}\n" for i, name in enumerate(names))
        script = tmp_path / "bin" / "nvidia-smi"
        script.parent.mkdir(exist_ok=True)
        script.write_text(f"#!/bin/sh\ncat <<'END'\n{lines}END\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return plug_in


@pytest.fixture
def extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Install a package that can be found and must not be imported."""

    def install(name: str) -> None:
        (tmp_path / "extras").mkdir(exist_ok=True)
        (tmp_path / "extras" / f"{name}.py").write_text("raise AssertionError('imported by the orchestrator')\n")
        monkeypatch.syspath_prepend(tmp_path / "extras")

    return install


def missing(tag: str, **how: str) -> str:
    found = missing_here(tag, load_hardware(tag), [how])
    return str(found) if found else ""


def test_gpus_are_those_that_nvidia_smi_shows(plug: Plug) -> None:
    plug("NVIDIA H200", "NVIDIA H200")
    assert gpus() == [Gpu("NVIDIA H200", 143_771 / 1024)] * 2


@pytest.mark.parametrize(("visible", "count"), [("0", 1), ("1,3", 2), ("", 0), ("GPU-0002", 1), ("0,1,2,3", 4)])
def test_hidden_gpus_do_not_count(plug: Plug, monkeypatch: pytest.MonkeyPatch, visible: str, count: int) -> None:
    plug(*["NVIDIA H200"] * 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert len(gpus()) == count


def test_a_broken_driver_is_no_gpu(tmp_path: Path, plug: Plug) -> None:
    plug("NVIDIA H200")
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed' >&2\nexit 9\n")
    assert gpus() == []


def test_no_gpu_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "the tag '2xh200' needs 2 GPUs, and nvidia-smi shows none" in missing("2xh200")
    assert missing("cpu") == ""


def test_fewer_gpus_than_the_tag_says_are_told(plug: Plug) -> None:
    plug("NVIDIA H200")
    text = missing("2xh200")
    assert "needs 2 GPUs, this machine has 1" in text and "NVIDIA H200 (140.4 GiB)" in text


def test_less_memory_than_the_tag_says_is_told(plug: Plug, extra: Callable[[str], None]) -> None:
    extra("unsloth")
    plug("NVIDIA A100-SXM4-80GB")
    assert "says 139 GiB a GPU, the NVIDIA A100-SXM4-80GB here has 80.0" in missing("1xh200")
    assert missing("1xa100-80gb") == ""


def test_missing_extras_are_told_with_the_command(plug: Plug, extra: Callable[[str], None]) -> None:
    plug("NVIDIA H200")
    text = missing("1xh200")
    assert "needs unsloth, which is not installed" in text and "pip install -e '.[unsloth]'" in text
    extra("unsloth")
    assert missing("1xh200", precision="fp32-master") == ""
    if machine.importlib.util.find_spec("torchao") is None:
        assert "pip install -e '.[gpu]'" in missing("1xh200", precision="bf16-stochastic")
    extra("torchao")
    assert missing("1xh200", precision="bf16-stochastic") == ""


def test_a_host_too_small_for_what_is_offloaded_is_told(plug: Plug) -> None:
    plug("NVIDIA H200", "NVIDIA H200")
    row = load_hardware("2xh200").model_copy(update={"offload": "cpu"})
    assert missing_here("2xh200", row, [], host_gib=0.1) is None
    text = str(missing_here("2xh200", row, [], host_gib=1e6))
    assert "offload: cpu takes 1,000,000 GiB of this machine's own memory (2 processes)" in text
    assert "the training takes 1,000,000 GiB" in str(missing_here("2xh200", load_hardware("2xh200"), [], host_gib=1e6))


# (GPUs, whether Unsloth is there, the tag that auto takes)
HERE = [
    ([], False, "cpu"),
    (["NVIDIA H200"], True, "1xh200"),
    (["NVIDIA H200"], False, "1xh200-fsdp"),
    (["NVIDIA H200"] * 2, True, "2xh200"),
    (["NVIDIA A100-SXM4-80GB"], True, "1xa100-80gb"),
    (["NVIDIA A100-SXM4-80GB"] * 8, True, "8xa100-80gb"),
    (["NVIDIA H100 80GB HBM3"] * 8, False, "8xh100-80gb"),
    (["NVIDIA GeForce RTX 4090"], True, "1x24gb"),
]


@pytest.mark.parametrize(("names", "unsloth", "tag"), HERE)
def test_auto_takes_the_tag_of_the_machine(
    plug: Plug, extra: Callable[[str], None], names: list[str], unsloth: bool, tag: str
) -> None:
    plug(*names)
    if unsloth:
        extra("unsloth")
    assert resolve_tag("auto") == (tag, load_hardware(tag))
    assert missing(tag) == ""


@pytest.mark.parametrize(
    ("names", "tag", "card"),
    [
        (["NVIDIA H200"] * 3, "3xh200-140gb", "h200"),
        (["NVIDIA L4"], "1xl4-22gb", "l4"),
        (["NVIDIA A100-SXM4-80GB"], "1xa100-80gb-fsdp", "a100"),  # without Unsloth, which the row 1xa100-80gb wants
        (["NVIDIA H200", "NVIDIA L4"], "2xgpu-22gb", None),
        (["NVIDIA Strange 9000"] * 2, "2xgpu-48gb", None),
    ],
)
def test_auto_describes_a_machine_that_no_row_describes(
    plug: Plug, names: list[str], tag: str, card: str | None
) -> None:
    plug(*names)
    found, row = resolve_tag("auto")
    assert found == tag and row.card == card and row.processes == len(names) and row.backend == "fsdp"
    assert row.memory_gib is not None and row.memory_gib < min(MIB[name] for name in names) / 1024
    assert missing_here(found, row, []) is None


def test_a_gpu_that_does_not_say_its_memory_is_told(plug: Plug, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MIB, "NVIDIA GB10", "[N/A]")  # type: ignore[arg-type]
    plug("NVIDIA GB10")
    with pytest.raises(UserError, match="does not say the memory of the NVIDIA GB10"):
        resolve_tag("auto")


def test_what_a_row_says_counts_where_the_gpu_does_not_say_its_memory(
    plug: Plug, monkeypatch: pytest.MonkeyPatch, extra: Callable[[str], None]
) -> None:
    extra("unsloth")
    monkeypatch.setitem(MIB, "NVIDIA GB10", "[N/A]")  # type: ignore[arg-type]
    plug("NVIDIA GB10")
    assert gpus() == [Gpu("NVIDIA GB10", 0.0)]
    assert not missing("1xh200")


@pytest.mark.parametrize("visible", [None, "0", "GPU-0000-aa", "MIG-1111", "MIG-GPU-0000-aa/1/0", "MIG-2222"])
def test_a_slice_of_a_card_is_not_taken_for_the_card(
    tmp_path: Path, plug: Plug, monkeypatch: pytest.MonkeyPatch, visible: str | None
) -> None:
    plug("NVIDIA H200")
    smi = tmp_path / "bin" / "nvidia-smi"
    plain = smi.read_text().removeprefix("#!/bin/sh\n")
    cut = "GPU 0: NVIDIA H200 (UUID: GPU-0000-aa)\n  MIG 3g.71gb     Device  0: (UUID: MIG-1111-bb)\n"
    smi.write_text(f"#!/bin/sh\nif [ $1 = -L ]; then cat <<'END'\n{cut}END\nelse {plain}fi\n")
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus() == ([] if visible == "MIG-2222" else [Gpu("slice of NVIDIA H200", 0.0)])


def test_a_run_is_refused_before_anything_starts(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(project, "hardware: cpu", "hardware: 2xh200")
    monkeypatch.setenv("PATH", str(tmp_path))
    plan = flow.load_plan(str(project / "run.yaml"), None)
    with pytest.raises(UserError, match="needs 2 GPUs"):
        flow.announce(plan, list(plan))
    flow.announce(plan, ["prepare_cpt", "report"])  # what needs no GPU may run here
    reused = {name: replace(planned, reasons=()) for name, planned in plan.items()}
    flow.announce(reused, list(plan))
    with pytest.raises(UserError, match="needs 2 GPUs"):
        flow.announce(flow.forced(reused, list(plan), "cpt"), list(plan))
    assert not list((project / "runs").glob("prepare*"))


def test_an_evaluation_that_cannot_run_is_refused_before_the_training(
    project: Path, tmp_path: Path, plug: Plug, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(project, "hardware: cpu", "hardware: 2xh200")
    plug("NVIDIA H200", "NVIDIA H200")
    plan = flow.load_plan(str(project / "run.yaml"), None)
    assert missing_for(plan, plan) is None
    evaluations = [name for name in plan if name.startswith("evaluate")]
    for name in evaluations:
        plan[name].order.how["memory_gib"] = 1e-4
    assert "float32 on one GPU: 0.0 of 0.0001 GiB" in str(missing_for(plan, plan))
    assert missing_for(plan, ["cpt", "sft"]) is None
    monkeypatch.setenv("PATH", str(tmp_path))  # without trainings nobody asked before, and lm-eval took the CPU
    assert "evaluation needs a GPU" in str(missing_for(plan, evaluations))


def test_a_plan_for_another_machine_is_printed_with_a_note(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert flow.main(["--config", str(project / "run.yaml"), "--plan", "--hardware", "2xh200"]) == 0
    out = capsys.readouterr().out
    assert "cpt    2xh200: fp32-master, recompute none" in out and "of 139 GiB a GPU" in out
    assert "not on this machine: the tag '2xh200' needs 2 GPUs" in out


def test_a_tracker_that_is_not_installed_is_told_before_anything_is_prepared(
    project: Path, tmp_path: Path, extra: Callable[[str], None], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    edit(project, "seed: 0", "seed: 0\nreport_to: mlflow")
    if importlib.util.find_spec("mlflow") is None:
        (tmp_path / "here/mlflow").mkdir(parents=True)  # what it wrote where we stand is no package
        monkeypatch.syspath_prepend(tmp_path / "here")
        plan = flow.load_plan(str(project / "run.yaml"), None)
        with pytest.raises(UserError, match="pip install mlflow-skinny"):
            flow.announce(plan, list(plan))
        flow.announce(plan, ["prepare_cpt", "report"])  # what trains nothing may run here
        assert flow.main(["--config", str(project / "run.yaml"), "--plan"]) == 0
        assert "not on this machine: report_to is 'mlflow', whose package is not installed" in capsys.readouterr().out
    extra("mlflow")
    plan = flow.load_plan(str(project / "run.yaml"), None)
    assert missing_for(plan, plan) is None


def test_auto_is_recorded_as_what_it_was(project: Path, plug: Plug) -> None:
    edit(project, "hardware: cpu", "hardware: auto")
    plug("NVIDIA H200", "NVIDIA H200")
    order = flow.load_plan(str(project / "run.yaml"), None)["cpt"].order
    assert order.how["tag"] == "2xh200" and order.how["processes"] == 2
    assert "auto" not in [value for value in order.how.values() if isinstance(value, str)]
