"""What only a GPU can show: `python -m pytest -m gpu`."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import AutoConfig

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from tasks import launch  # noqa: E402
from tasks.errors import EXIT_USER_ERROR  # noqa: E402
from tasks.execute import compute  # noqa: E402
from tasks.plan import Planned  # noqa: E402
from tasks.stage import ERROR, read_artifact, read_order, write_order  # noqa: E402
from tasks.training.attention import ISOLATED, attention_plan, isolated_attention  # noqa: E402
from tasks.training.isolation import needs_probe  # noqa: E402
from tasks.training.linear_loss import linear_cross_entropy  # noqa: E402
from tasks.training.metrics import read_metrics  # noqa: E402
from tasks.training.stochastic import StochasticAdamW8bit  # noqa: E402
from tests.benchmarks.gpu.tables import check_curve, differences  # noqa: E402
from tests.training.conftest import (  # noqa: E402
    finish_worker,
    make_documents,
    make_model,
    make_prepared,
    make_stage,
    pack,
    run_worker,
    start_worker,
    wait_until,
    weights,
)
from tests.training.test_architectures import make_init  # noqa: E402
from tests.training.test_loading import WHOLE, with_a_stranger, with_new_tokens  # noqa: E402

COMPILED = {"device": "cuda", "precision": "bf16-stochastic", "compile": True}
LENGTHS = [400, 3, 1, 333, 170, 117]


def make_small(folder: Path) -> Path:
    """Rows of some ten steps."""
    return make_prepared(folder / "prepare_cpt-test", pack(make_documents(120))[:42])


def block_mask_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The dense reference."""
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).cuda()
    mask = (document[:, None] == document[None]) & torch.ones(len(document), len(document), device="cuda").tril().bool()
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float32, 1e-4)])
def test_attention_equals_the_block_mask_forward_and_backward(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    make = [torch.randn(1, heads, sum(LENGTHS), 64, device="cuda") for heads in (4, 2, 2)]
    plan = attention_plan(ISOLATED, "cuda", bf16=dtype is torch.bfloat16)(LENGTHS)
    assert ("document_bounds" in plan) == (dtype is torch.bfloat16)
    plan = {k: v.cuda() if isinstance(v, torch.Tensor) else [x.cuda() for x in v] if isinstance(v, list) else v
            for k, v in plan.items()}  # fmt: skip
    found = []
    for attend, kind in ((block_mask_attention, torch.float32), (None, dtype)):
        qkv = [x.to(kind).requires_grad_() for x in make]
        out = attend(*qkv) if attend else isolated_attention(None, *qkv, None, **plan)[0]  # type: ignore[arg-type]
        found.append([out.float(), *(g.float() for g in torch.autograd.grad(out.float().square().sum(), qkv))])
    for reference, ours in zip(*found, strict=True):
        assert (ours - reference).norm() <= tolerance * reference.norm()


def test_fused_loss_equals_the_plain_one_in_bf16() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(5000, 256, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(128_256, 256, device="cuda", dtype=torch.bfloat16) * 0.05).requires_grad_()
    targets = torch.randint(128_256, (5000,), device="cuda")
    total, losses = linear_cross_entropy(hidden, weight, targets)
    ours = torch.autograd.grad(total / 5000, (hidden, weight))
    plain = cross_entropy(hidden.float() @ weight.float().T, targets, reduction="none")
    theirs = torch.autograd.grad(plain.mean(), (hidden, weight))
    assert (losses - plain).abs().max() < 0.05 and abs(float(losses.mean() - plain.mean())) < 1e-3
    for one, other in zip(ours, theirs, strict=True):
        assert (one.float() - other.float()).norm() < 0.02 * other.float().norm()


def assert_equal_but_for_ties(old: torch.Tensor, new: torch.Tensor, beta: float, theirs: Any, ours: Any) -> None:
    """A moment in the middle between two codes may take either; bf16 gradients, of 8 bits, meet many on the first step.

    What float32 loses is in proportion to what is added up, and the sum may be small.
    """
    torch.testing.assert_close(theirs.scale, ours.scale, rtol=1e-5, atol=0)
    scale = theirs.scale.repeat_interleave(256)
    share, size = (x.flatten() / scale for x in (torch.lerp(new, old, beta), new.abs() + old.abs()))
    a, b = theirs.codes.flatten().int(), ours.codes.flatten().int()
    middle = (theirs.qmap[a] + theirs.qmap[b]) / 2
    apart = a != b
    assert ((a - b).abs() <= 1).all() and float(apart.float().mean()) < 0.01
    off = ((share - middle).abs() / (size + middle.abs()))[apart]
    assert (off <= 2e-6).all(), f"only ties are decided differently: {off.max():.1e}"


def test_our_step_of_the_8_bit_optimizer_is_torchaos() -> None:
    from torchao.optim import AdamW8bit

    torch.manual_seed(0)
    first = [torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()
             for shape in [(256, 256)] * 6 + [(512, 256), (300,)]]  # fmt: skip
    second = [p.detach().clone().requires_grad_() for p in first]
    theirs = AdamW8bit(first, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01, bf16_stochastic_round=True)
    ours = StochasticAdamW8bit(second, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01)
    powers = {"exp_avg": (0.9, 1), "exp_avg_sq": (0.95, 2)}  # the mean of the gradient, and of its square
    for step in range(3):
        before: list[dict[str, torch.Tensor]] = []
        for p, q in zip(first, second, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
            q.data.copy_(p.data)  # each step from the same place: what is random must not add up
            before.append(dict.fromkeys(powers, torch.zeros_like(p.grad.float())))
            for name in powers if step else ():
                ours.state[q][name].copy_(theirs.state[p][name])
                if p.numel() >= 4096:
                    before[-1][name] = theirs.state[p][name].dequantize().float()
        theirs.step()
        ours.step()
        for p, q, old in zip(first, second, before, strict=True):
            for name, (beta, power) in powers.items():
                a, b = theirs.state[p][name], ours.state[q][name]
                assert hasattr(a, "codes") == hasattr(b, "codes") == (p.numel() >= 4096)
                if hasattr(a, "codes"):
                    assert_equal_but_for_ties(old[name], p.grad.float() ** power, beta, a, b)
            difference = (p.detach() - q.detach()).float()
            assert difference.any(), "the rounding is random"
            # A step is 1e-3: of a weight near zero, the larger side of its way counts.
            last_bit = 2.0 ** ((p.detach().float().abs() + 4e-3).log2().floor() - 7)
            assert (difference.abs() <= last_bit).all(), "one rounding each, up or down"
            error = float(difference.mean() / (difference.std() / difference.numel() ** 0.5))
            assert abs(error) < 5, f"roundings are right on average: {error:.1f} standard errors"


def test_updates_below_the_last_bit_arrive_on_average() -> None:
    start = torch.linspace(0.5, 2, 2**20, device="cuda").bfloat16()
    weight = start.clone().requires_grad_()
    optimizer = StochasticAdamW8bit([weight], lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(50):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    moved = (start.float() - weight.detach().float()).mean()
    unchanged = float((start == weight).float().mean())
    assert 0.5 < unchanged < 0.99, "a step is 1/200 of a last bit: most weights stand, where the others make up for it"
    assert abs(float(moved) / (50 * 1e-5) - 1) < 0.02


@pytest.mark.parametrize("backend", ["fsdp", "unsloth"])
def test_a_worker_on_a_gpu_gives_the_cpus_weights_in_float32(backend: str, tmp_path: Path) -> None:
    if backend == "unsloth" and importlib.util.find_spec("unsloth") is None:  # importing it here would patch torch
        pytest.skip("Unsloth is not installed")
    base = make_model(tmp_path / "base")
    prepared = make_small(tmp_path)
    stages = {}
    for device in ("cpu", "cuda"):
        how = {
            "device": device,
            "backend": backend if device == "cuda" else "fsdp",
            "microbatch_rows": 2 if device == "cuda" else 1,
        }
        stages[device] = make_stage(tmp_path / device, base, prepared, copy.deepcopy(how))
        assert run_worker(stages[device]) == 0, (stages[device] / "worker.log").read_text()[-2000:]
    cpu, gpu = weights(stages["cpu"]), weights(stages["cuda"])
    assert max(float((cpu[name] - gpu[name]).abs().max()) for name in cpu) < 2e-4


def run_on(directory: Path, processes: int, until_step: int | None = None) -> None:
    """Train a stage on so many GPUs, to its end or up to a step, where it is told to stop."""
    order = read_order(directory)
    write_order(replace(order, how=order.how | {"processes": processes}), directory.parent)
    worker = start_worker(directory, processes)
    if until_step:
        metrics = directory / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= until_step, worker)
        worker.terminate()
    code = finish_worker(worker)
    assert (code != 0) == bool(until_step), (directory / "worker.log").read_text()[-2000:]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16-stochastic", 0.02)])
def test_two_gpus_then_one_then_two_give_the_curve_of_one(precision: str, tolerance: float, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    prepared = make_prepared(tmp_path / "prepare_cpt-test", pack(make_documents(5000))[:1200])
    how = {"device": "cuda", "precision": precision, "microbatch_rows": 2}
    straight, moved = (make_stage(tmp_path / name, base, prepared, how) for name in ("straight", "moved"))
    run_on(straight, 1)
    run_on(moved, 2, until_step=20)
    run_on(moved, 1, until_step=100)
    run_on(moved, 2)
    counts = read_artifact(moved)["counts"]
    assert len(counts["resumed_from"]) == 2 and counts["steps"] == 300
    curves = [[line["loss"] for line in read_metrics(stage)] for stage in (straight, moved)]
    assert max(abs(b / a - 1) for a, b in zip(*curves, strict=True)) < tolerance


@pytest.mark.parametrize("processes", [1, 2])
def test_weights_in_the_hosts_memory_learn_the_same(processes: int, tmp_path: Path) -> None:
    if torch.cuda.device_count() < processes:
        pytest.skip("needs two GPUs")
    base = make_model(tmp_path / "base")
    prepared = make_small(tmp_path)
    stages = {}
    for offload in ("none", "cpu"):
        how = {"device": "cuda", "processes": processes, "offload": offload, "compile": False}
        stages[offload] = make_stage(tmp_path / offload, base, prepared, how)
        launch.run_worker("tasks.training", [stages[offload]], read_order(stages[offload]).how, forward=print)
    assert read_artifact(stages["cpu"])["counts"]["wrapper"] == "FSDP2"
    here, there = weights(stages["none"]), weights(stages["cpu"])
    assert max(float((here[name] - there[name]).abs().max()) for name in here) < 2e-4


@pytest.mark.parametrize("precision", ["fp32-master", "bf16-stochastic"])
def test_gpus_read_their_shards_as_they_were_read_whole(precision: str, tmp_path: Path) -> None:
    """The first step's loss is that of the weights as they were read: equal to the bit. Kernels differ later."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    if precision == "bf16-stochastic":
        pytest.importorskip("torchao")
    base = make_model(tmp_path / "base", tied=precision == "fp32-master")
    prepared = with_new_tokens(tmp_path / "prepare_cpt-test")
    stages = {}
    for way, init in (("shards", base), ("whole", with_a_stranger(base, tmp_path / "stranger"))):
        how = {"device": "cuda", "processes": 2, "precision": precision, "compile": False}
        stages[way] = make_stage(tmp_path / way, init, prepared, how)
        assert run_worker(stages[way], 2) == 0, (stages[way] / "worker.log").read_text()[-2000:]
        assert (WHOLE in (stages[way] / "worker.log").read_text()) == (way == "whole")
        assert read_artifact(stages[way])["counts"]["wrapper"] == "FSDP2"
    first = [read_metrics(stage)[0]["loss"] for stage in stages.values()]
    assert first[0] == first[1]
    if precision == "fp32-master":
        one, other = weights(stages["shards"]), weights(stages["whole"])
        assert max(float((one[name] - other[name]).abs().max()) for name in one) < 2e-4


HOLD = """
import sys, torch
torch.zeros(1, device="cuda")
held = torch.empty(torch.cuda.mem_get_info()[0] - 4 * 2**30, dtype=torch.uint8, device="cuda")
print("held", flush=True)
sys.stdin.read()
"""


def test_a_gpu_that_is_full_is_tried_with_half_the_micro_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process leaves 4 GiB of the GPU; 1,024 rows would take about 8."""
    pytest.importorskip("torchao")
    base = make_model(tmp_path / "base", hidden_size=512, intermediate_size=2048, num_hidden_layers=4,
                      num_attention_heads=8, num_key_value_heads=4)  # fmt: skip
    prepared = make_prepared(tmp_path / "prepare_cpt-test", pack(make_documents(12_000))[:3072])
    how = {"device": "cuda", "precision": "bf16-stochastic", "compile": False, "on_oom": "retry"}
    straight = make_stage(tmp_path / "straight", base, prepared, how | {"microbatch_rows": 128}, batch_tokens=65_536)
    assert run_worker(straight) == 0, (straight / "worker.log").read_text()[-2000:]

    order = read_order(
        make_stage(tmp_path / "full", base, prepared, how | {"microbatch_rows": 1024}, batch_tokens=65_536)
    )
    planned, said = Planned(order, order.directory(tmp_path / "full"), ("not yet run",)), []
    (planned.directory / "order.json").unlink()
    planned.directory.rmdir()
    monkeypatch.setattr("tasks.execute.upstream", lambda *_: {})  # the prepared rows lie elsewhere
    with subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout and holder.stdout.readline() == b"held\n"
        compute([planned], "tasks.training", said.append)
        holder.communicate()
    assert any("ran out of GPU memory at step 1 with 1024 rows a micro-batch" in line for line in said), said
    assert read_artifact(planned.directory)["how"]["microbatch_rows"] in (256, 512)
    curves = [[(line["step"], line["supervised_tokens"], line["loss"]) for line in read_metrics(stage)]
              for stage in (straight, planned.directory)]  # fmt: skip
    assert len(curves[0]) == 3 and [line[:2] for line in curves[0]] == [line[:2] for line in curves[1]]
    assert max(abs(b[2] / a[2] - 1) for a, b in zip(*curves, strict=True)) < 0.01


@pytest.mark.parametrize("recompute", ["none", "pointwise", "selective", "full"])
def test_compiled_layers_learn_what_the_others_do(recompute: str, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    prepared = make_prepared(tmp_path / "prepare_cpt-test", pack(make_documents(240))[:84])
    curves = []
    for how in ({"compile": False}, {"compile": True, "recompute": recompute}):
        stage = make_stage(tmp_path / str(how["compile"]), base, prepared,
                           {"device": "cuda", "precision": "fp32-master", "microbatch_rows": 2} | how)  # fmt: skip
        assert run_worker(stage) == 0, (stage / "worker.log").read_text()[-2000:]
        curves.append([line["loss"] for line in read_metrics(stage)])
    assert len(curves[0]) == 21 and abs(curves[1][0] / curves[0][0] - 1) < 2e-3
    assert max(abs(b / a - 1) for a, b in zip(*curves, strict=True)) < 0.01


@pytest.mark.parametrize("processes", [1, 2])
def test_a_family_that_no_test_holds_is_asked_and_trains(processes: int, tmp_path: Path) -> None:
    """The probe before the first step, with layers to compile, our kernels and shards."""
    if torch.cuda.device_count() < processes:
        pytest.skip("needs two GPUs")
    base = make_init(tmp_path / "base", "olmo2", {})
    assert needs_probe(AutoConfig.from_pretrained(base))
    run_on(make_stage(tmp_path, base, make_small(tmp_path), COMPILED | {"processes": processes}), processes)


def test_a_model_whose_documents_see_each_other_is_refused_here_too(tmp_path: Path) -> None:
    bart = {"is_decoder": True, "init_std": 0.5, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4}
    stage = make_stage(tmp_path, make_init(tmp_path / "base", "bart", bart), make_small(tmp_path), COMPILED)
    assert run_worker(stage) == EXIT_USER_ERROR
    assert "with another document before it, the losses of one changed by" in (stage / ERROR).read_text()


@pytest.mark.timeout(900)
def test_one_recipe_gives_one_curve_here_too(tmp_path: Path) -> None:
    """The embedded example, 200 steps, by both backends on this machine's CPU, one GPU and two; `make benchmark-gpu` does
    the same with a model of 100M parameters."""
    if importlib.util.find_spec("unsloth") is None:
        pytest.skip("Unsloth is not installed")
    out = ["--slots", "4", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    subprocess.run([sys.executable, "-m", "tests.benchmarks.gpu", "curves", "--only", "example", *out], check=True)
    rows = {row["name"]: row for row in json.loads((tmp_path / "out/results.json").read_text())["rows"]}
    assert not [row for row in rows.values() if "failed" in row]
    found = list(differences(rows))
    assert {one.kind for one in found} >= {
        "fp32 cpu 4",
        "fp32 unsloth 8",
        "fp32 fsdp 1",
        "master unsloth 8",
        "master fsdp 2",
    }
    for one in found:
        check_curve(one)
