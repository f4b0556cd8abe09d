"""`on_oom: retry` with the real worker: from its last checkpoint, at half the micro-batch, to the same model."""

from pathlib import Path

import pytest

from tasks.execute import compute
from tasks.plan import Planned
from tasks.stage import read_artifact, read_order
from tasks.training.metrics import read_metrics
from tests.training.conftest import largest_difference, make_stage, train_here


@pytest.mark.slow  # two starts of a worker
def test_a_stage_goes_on_at_half_the_micro_batch(
    tmp_path: Path, base: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    every_3 = {"checkpoint": {"every_steps": 3, "every_minutes": None, "keep_last": 2}}
    undisturbed = make_stage(tmp_path / "a", base, prepared, {"microbatch_rows": 4})
    train_here(undisturbed)

    order = read_order(make_stage(tmp_path / "b", base, prepared, every_3 | {"microbatch_rows": 4, "on_oom": "retry"}))
    planned, said = Planned(order, order.directory(tmp_path / "b"), ("not yet run",)), []
    (planned.directory / "order.json").unlink()
    planned.directory.rmdir()
    monkeypatch.setattr("tasks.execute.upstream", lambda *_: {})  # the prepared rows lie elsewhere
    assert compute([planned], "tests.training.small_gpu", said.append) is False

    assert any("ran out of GPU memory at step 8 with 4 rows a micro-batch" in line for line in said)
    assert any("resuming from the checkpoint of step 6" in line for line in said)
    assert read_artifact(planned.directory)["how"]["microbatch_rows"] == 2
    steps, expected = (
        [(line["step"], line["supervised_tokens"]) for line in read_metrics(stage)]
        for stage in (planned.directory, undisturbed)
    )
    assert steps == expected
    assert largest_difference(planned.directory, undisturbed) < 1e-6  # sums in another order
