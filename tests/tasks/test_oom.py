"""A worker that runs out of GPU memory: a real process that exits with 76 until its micro-batch is small enough."""

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import UserError
from tasks.execute import compute
from tasks.oom import next_rows, refusal
from tasks.plan import Planned
from tasks.stage import OOM, Order, read_artifact, read_order

WORKER = "tests.tasks.worker"


def planned(runs: Path, most_rows: int, **how: Any) -> Planned:
    order = Order(
        "cpt", "train", "tiny", {"deed": f"needs memory for {most_rows}"}, {"device": "cpu", "tag": "box", **how}, {}
    )
    return Planned(order, order.directory(runs), ("not yet run",))


def test_retrying_halves_the_micro_batch_until_it_fits(tmp_path: Path) -> None:
    said: list[str] = []
    stage = planned(tmp_path, 2, microbatch_rows=8, on_oom="retry")
    assert compute([stage], WORKER, said.append) is False
    artifact = read_artifact(stage.directory)
    assert artifact["how"]["microbatch_rows"] == 2
    assert [record["microbatch_rows"] for record in artifact["how"]["out_of_memory"]] == [8, 4]
    assert artifact["counts"]["tries"] == ["2", "4", "8"]  # one directory, so the checkpoints of each try are there
    told = [line for line in said if "ran out" in line]
    assert (
        len(told) == 2 and "at step 3 with 8 rows a micro-batch: 80.0 GiB were taken, 12.5 GiB were planned" in told[0]
    )
    assert told[0].endswith("it goes on from its last checkpoint with 4 rows a micro-batch")
    assert not (stage.directory / OOM).exists()
    assert stage.order.key == read_order(stage.directory).key  # where it runs is no part of what it is
    assert compute([stage], WORKER, said.append) is True  # planned with 8 rows again, and reused


def test_a_resumed_stage_starts_with_what_it_came_down_to(tmp_path: Path) -> None:
    stage = planned(tmp_path, 2, microbatch_rows=8, on_oom="retry")
    compute([stage], WORKER, print)
    (stage.directory / "artifact.json").unlink()
    said: list[str] = []
    compute([stage], WORKER, said.append)
    assert not [line for line in said if "ran out" in line]
    assert read_artifact(stage.directory)["how"]["microbatch_rows"] == 2
    (stage.directory / "artifact.json").unlink()
    compute([planned(tmp_path, 2, microbatch_rows=8, on_oom="retry", tag="larger box")], WORKER, said.append)
    assert "with 8 rows a micro-batch" in "".join(said)  # another machine is asked anew


def test_one_row_that_does_not_fit_is_the_end(tmp_path: Path) -> None:
    stage = planned(tmp_path, 0, microbatch_rows=3, on_oom="retry", backend="fsdp", device="cuda", recompute="none",
                    precision="fp32-master", offload="none")  # fmt: skip
    with pytest.raises(UserError, match=r"with 1 row a micro-batch: 10.0 GiB were taken") as refused:
        compute([stage], WORKER, print)
    assert refused.value.allowed == "recompute: selective, or precision: bf16-stochastic, or offload: cpu"
    assert sorted(path.name for path in stage.directory.glob("checkpoints/*")) == ["1", "3"]


def test_without_retry_the_error_says_the_next_setting(tmp_path: Path) -> None:
    stage = planned(tmp_path, 2, microbatch_rows=8, recompute="full", on_oom="fail")
    with pytest.raises(UserError) as refused:
        compute([stage], WORKER, print)
    text = str(refused.value)
    assert [part for part in ("80.0 GiB were taken, 12.5 GiB were planned", "microbatch_rows: 4", "on_oom: retry", "'box'")
            if part not in text] == [], text  # fmt: skip
    assert json.loads((stage.directory / OOM).read_text())["microbatch_rows"] == 8  # stays, for who looks


def test_a_worker_that_could_not_write_is_understood_by_its_exit_code() -> None:
    text = str(refusal("sft", {}, {"microbatch_rows": 1, "recompute": "full", "on_oom": "retry"}))
    assert "sft ran out of GPU memory: what it took is not known" in text
    assert "more GPUs" in text


@pytest.mark.parametrize(
    ("how", "smaller"),
    [
        ({"backend": "unsloth", "recompute": "full"}, "recompute: unsloth"),
        (
            {"backend": "unsloth", "recompute": "unsloth"},
            "nothing smaller on this machine: take more GPUs, or larger ones",
        ),
        (
            {"backend": "fsdp", "recompute": "full", "precision": "bf16-stochastic"},
            "offload: cpu with precision: fp32-master",
        ),
        (
            {"backend": "unsloth", "recompute": "none", "precision": "bf16-stochastic", "compile": True},
            "recompute: pointwise",
        ),
        (
            {"backend": "unsloth", "recompute": "pointwise", "precision": "bf16", "compile": True},
            "recompute: selective, or precision: bf16-stochastic",
        ),
        (
            {"backend": "fsdp", "recompute": "selective", "precision": "fp32-master", "offload": "cpu"},
            "recompute: full",
        ),
    ],
)
def test_what_is_advised_takes_less_and_is_allowed(how: dict[str, str], smaller: str) -> None:
    assert refusal("cpt", {}, {"device": "cuda", "microbatch_rows": 1, **how}).allowed == smaller


def test_a_full_gpu_is_known_by_all_its_names() -> None:
    from tasks.training.full import which_is_full

    chained = RuntimeError("a step failed")
    chained.__cause__ = RuntimeError("[CUDA]: out of memory")
    assert which_is_full(chained) == "gpu"
    assert which_is_full(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")) == "gpu"
    assert which_is_full(RuntimeError("CUDA error: an illegal memory access was encountered")) == ""


def test_full_host_memory_is_not_taken_for_a_full_gpu() -> None:
    import torch

    from tasks.training.full import which_is_full

    def pin_memory() -> None:
        raise RuntimeError("CUDA error: out of memory")  # the driver's words, where it cannot pin

    with pytest.raises(RuntimeError) as pinning:
        pin_memory()
    assert which_is_full(pinning.value) == "host"
    with pytest.raises(RuntimeError) as plain:
        torch.empty(2**55, dtype=torch.uint8)
    assert which_is_full(plain.value) == "host" and which_is_full(MemoryError()) == "host"


def test_a_smaller_micro_batch_is_no_answer_to_full_host_memory() -> None:
    record = {"memory": "host", "measured_gib": 61.0, "predicted_gib": 500.0, "microbatch_rows": 8, "step": 1}
    how = {"microbatch_rows": 8, "on_oom": "retry", "offload": "cpu", "tag": "box"}
    assert next_rows(how, record | {"memory": "gpu"}) == 4 and next_rows(how, record) is None
    assert next_rows(how | {"recompute": "unsloth"}, record) == 4  # its inputs of layers lie there
    text = str(refusal("cpt", record, how))
    assert "ran out of the machine's own memory at step 1 with 8 rows a micro-batch: 61.0 GiB were taken by one" in text
    assert "500.0 GiB were planned for all" in text and "more nodes" in text and "microbatch_rows: 4" not in text
