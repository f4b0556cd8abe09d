"""The prediction of memory: rules that follow from first principles, and every measured peak within 8 %."""

from dataclasses import replace

import pytest

from tasks.memory import GIB, STATE_BYTES, Setting, moments, predict
from tasks.model_shape import ModelShape, shape_of
from tasks.speed import Measured, measured
from tests.benchmarks.plan import CLUSTERS, LLAMA_2, RULE_OF_THUMB, TEXTBOOK, holds, put_into, state_gigabytes
from tests.conftest import ROOT

LLAMA_8B = shape_of({"model_type": "llama", "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336,
                     "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
                     "tie_word_embeddings": False})  # fmt: skip
PLAIN = Setting("fsdp", "bf16-stochastic", "none", microbatch_rows=2, seq_len=4096, accumulation=8)


def gib(setting: Setting, shape: ModelShape = LLAMA_8B) -> float:
    return predict(shape, setting).total / GIB


@pytest.mark.parametrize("run", [run for run in measured() if "memory" in run.valid], ids=lambda run: run.name)
def test_every_measured_peak_is_predicted_within_8_percent(run: Measured) -> None:
    assert gib(run.setting, run.shape) == pytest.approx(run.peak_gib, rel=0.08)


def test_there_are_measurements_to_hold_it_to() -> None:
    assert {run.setting.recompute for run in measured()} == {"none", "pointwise", "selective", "full", "unsloth"}


# --- first principles ------------------------------------------------------------------------------------------------


def test_the_rule_of_thumb_is_bf16_weights_and_gradients_with_float32_moments() -> None:
    assert sum(RULE_OF_THUMB) == 12
    assert state_gigabytes(7e9, RULE_OF_THUMB) == pytest.approx(84)
    assert state_gigabytes(70e9, RULE_OF_THUMB) == pytest.approx(840)


@pytest.mark.parametrize(
    ("precision", "bytes_a_parameter"), [("fp32-master", 16), ("bf16-stochastic", 6), ("bf16", 8), ("fp32", 16)]
)
def test_bytes_a_parameter(precision: str, bytes_a_parameter: float) -> None:
    assert sum(STATE_BYTES[precision]) == pytest.approx(bytes_a_parameter, abs=0.04)  # the 8-bit states have scales
    states = predict(LLAMA_8B, replace(PLAIN, precision=precision))
    total = states.weights + states.gradients + states.optimizer
    assert total / LLAMA_8B.parameters == pytest.approx(bytes_a_parameter, abs=0.04)


def test_sharding_divides_the_states_and_offloading_takes_them_away() -> None:
    one, eight = (predict(LLAMA_8B, replace(PLAIN, precision="fp32-master", world_size=n)) for n in (1, 8))
    assert eight.weights == one.weights / 8 and eight.optimizer == one.optimizer / 8
    away = replace(PLAIN, precision="fp32-master", world_size=8, offload="cpu")
    assert predict(LLAMA_8B, away).weights == predict(LLAMA_8B, away).optimizer == 0


@pytest.mark.parametrize("backend", ["fsdp", "unsloth"])
def test_more_recompute_and_smaller_micro_batches_take_less(backend: str) -> None:
    kinds = ["none", "pointwise", "selective", "full", *(["unsloth"] if backend == "unsloth" else [])]
    sizes = [gib(replace(PLAIN, backend=backend, microbatch_rows=8, recompute=kind)) for kind in kinds]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(kinds)
    rows = [gib(replace(PLAIN, backend=backend, microbatch_rows=rows)) for rows in (8, 4, 2, 1)]
    assert rows == sorted(rows, reverse=True)


def test_the_parts_add_up_and_the_peak_is_the_largest_moment() -> None:
    parts = predict(LLAMA_8B, PLAIN)
    assert sum(parts.as_gib().values()) == pytest.approx(parts.total / GIB)
    assert parts.total == max(moment.total for moment in moments(LLAMA_8B, PLAIN))


def test_one_micro_batch_a_step_holds_no_gradients_while_the_loss_stands() -> None:
    assert gib(PLAIN) - gib(replace(PLAIN, accumulation=1)) == pytest.approx(2 * LLAMA_8B.parameters / GIB)


# --- which cluster holds which model ---------------------------------------------------------------------------------

# 4xA100-40, 8xA100-40, 8xA100-80, 16xH100-80; rows of 4096, one at a time, full recompute
HOLDS: dict[tuple[str, str, str], list[bool]] = {
    ("7B", TEXTBOOK, "none"): [True, True, True, True],
    ("13B", TEXTBOOK, "none"): [False, True, True, True],
    ("70B", TEXTBOOK, "none"): [False, False, False, True],  # 840 GB: 210, 105, 105 and 52 GB a GPU
    ("7B", "fp32-master", "none"): [True, True, True, True],
    ("13B", "fp32-master", "none"): [False, True, True, True],
    ("70B", "fp32-master", "none"): [False, False, False, False],
    ("70B", "bf16-stochastic", "none"): [False, False, True, True],
    ("7B", "fp32-master", "cpu"): [True, True, True, True],
    ("13B", "fp32-master", "cpu"): [True, True, True, True],
    ("70B", "fp32-master", "cpu"): [True, True, True, True],
}


@pytest.mark.parametrize(("model", "policy", "offload"), HOLDS)
def test_which_cluster_holds_which_model(model: str, policy: str, offload: str) -> None:
    held = [holds(LLAMA_2[model], cluster, policy, offload) for cluster in CLUSTERS]
    assert held == HOLDS[model, policy, offload]


def test_the_readme_shows_the_tables_as_they_are_now() -> None:
    readme = (ROOT / "README.md").read_text()
    assert put_into(readme) == readme, "run `python -m tests.benchmarks.plan --readme`"


def test_what_a_cluster_holds_is_no_less_with_less_precision() -> None:
    for cluster in CLUSTERS:
        for shape in LLAMA_2.values():
            if holds(shape, cluster, "fp32-master", "none"):
                assert holds(shape, cluster, "bf16-stochastic", "none")
