"""What the plan chooses for a tag, and how it refuses what does not fit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tasks.choose import HEADROOM, Choice, Job, choose, combinations, evaluation_dtype
from tasks.config import load_config
from tasks.errors import UserError
from tasks.hardware import Hardware, load_hardware
from tasks.memory import Setting
from tasks.model_shape import shape_of
from tasks.plan import make_plan
from tasks.speed import measured, predict_speed
from tests.tasks.test_memory import LLAMA_8B

LLAMA_1B = shape_of({"model_type": "llama", "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192,
                     "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
                     "tie_word_embeddings": True})  # fmt: skip
JOB_8B, JOB_1B = Job(LLAMA_8B, 4096, 16), Job(LLAMA_1B, 4096, 16)
JOB_70B = Job(replace(LLAMA_8B, hidden=8192, mlp=28_672, queries=8192, heads=64, num_layers=80, layer_parameters=855_654_400,
                      parameters=70_553_706_496), 4096, 64)  # fmt: skip
GPU: dict[str, Any] = {"backend": "fsdp", "device": "cuda", "card": "h200", "memory_gib": 139}


def row(**said: Any) -> Hardware:
    return Hardware.model_validate(GPU | said)


def chosen(tag: str, job: Job) -> Choice:
    return choose(tag, load_hardware(tag), job)


@pytest.mark.parametrize(
    "tag", ["1x24gb", "1xa100-80gb", "1xh200", "1xh200-fsdp", "2xh200", "8xa100-80gb", "8xh100-80gb"]
)
def test_what_is_chosen_is_concrete_leaves_room_and_is_the_fastest(tag: str) -> None:
    best, hardware = chosen(tag, JOB_1B), load_hardware(tag)
    assert "auto" not in best.how.values() and best.how["compile"] is True
    assert best.gib <= (1 - HEADROOM) * (hardware.memory_gib or 0)
    everything = list(combinations(hardware, JOB_1B))
    assert len(everything) >= 8 and "bf16" not in {choice.hardware.precision for choice in everything}
    fitting = [choice for choice in everything if choice.gib <= (1 - HEADROOM) * (hardware.memory_gib or 0)]
    fastest = max(choice.speed.tokens_per_second for choice in fitting if choice.speed)
    assert best.speed and best.speed.tokens_per_second >= 0.95 * fastest


def test_a_card_that_nobody_knows_gets_the_settings_of_one_that_is_known() -> None:
    unknown = load_hardware("1xh200-fsdp").model_copy(update={"card": None})
    assert choose("1xgpu-139gb", unknown, JOB_8B).how == chosen("1xh200-fsdp", JOB_8B).how


def test_float32_on_a_gpu_is_not_compiled() -> None:
    exact = load_hardware("1xh200-fsdp").model_copy(update={"precision": "fp32"})
    assert choose("1xh200-fsdp", exact, JOB_1B).how["compile"] is False


def test_float32_master_weights_where_they_fit_and_else_stochastic_rounding() -> None:
    assert chosen("2xh200", JOB_8B).how["precision"] == "fp32-master"
    assert chosen("1xa100-80gb", JOB_8B).how["precision"] == "bf16-stochastic"


def test_recompute_is_taken_where_memory_asks_for_it() -> None:
    roomy = choose("box", row(memory_gib=139, precision="bf16-stochastic"), JOB_8B)
    less = choose("box", row(memory_gib=110, precision="bf16-stochastic", microbatch_rows=4), JOB_8B)
    tight = choose("box", row(memory_gib=62, precision="bf16-stochastic"), JOB_8B)
    assert roomy.how["recompute"] == "none" and less.how["recompute"] == "pointwise"
    assert tight.how["recompute"] in ("selective", "full")


def test_a_micro_batch_is_no_larger_than_a_gpus_share_of_a_step() -> None:
    for rows_per_step in (1, 3, 16):
        rows = choose("box", row(processes=2), Job(LLAMA_1B, 512, rows_per_step)).how["microbatch_rows"]
        assert rows <= max(1, rows_per_step // 2)


def test_what_a_row_says_is_taken_as_it_is() -> None:
    said = {"precision": "bf16", "recompute": "full", "microbatch_rows": 3, "compile": False, "on_oom": "retry"}
    assert said.items() <= choose("box", row(**said), JOB_8B).how.items()


def test_on_a_cpu_nothing_is_predicted_and_nothing_changes() -> None:
    assert chosen("cpu", JOB_1B).how == {"precision": "fp32", "recompute": "none", "microbatch_rows": 4, "offload": "none",
                                         "compile": False, "on_oom": "fail"}  # fmt: skip
    assert chosen("cpu-x2", JOB_1B).how["microbatch_rows"] == 1


# --- what does not fit -----------------------------------------------------------------------------------------------

# (the row, the job, what the message must say)
UNFIT: dict[str, tuple[dict[str, Any], Job, list[str]]] = {
    "rows": ({"precision": "bf16-stochastic", "recompute": "none", "microbatch_rows": 8}, JOB_8B,
             ["microbatch_rows: ", "recompute: ", "GiB a GPU with bf16-stochastic, recompute none, 8 rows"]),
    "precision": ({"precision": "fp32-master", "recompute": "none", "microbatch_rows": 2, "memory_gib": 79}, JOB_8B,
                  ["precision: bf16-stochastic", "offload: cpu", "--hardware"]),
    "everything": ({"memory_gib": 23.5, "backend": "unsloth"}, JOB_8B, ["at the least", "backend: fsdp, offload: cpu, microbatch_rows: 1", "--hardware 1xa100-80gb"]),
    "GPUs": ({"memory_gib": 23.5, "processes": 2, "offload": "cpu", "card": "rtx-3090"}, JOB_70B, ["--hardware 8xa100-80gb"]),
    "more of these": ({"memory_gib": 79, "processes": 8}, Job(replace(JOB_70B.shape, num_layers=320, parameters=280_000_000_000), 4096, 64),
                      ["of these GPUs"]),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_a_plan_that_does_not_fit_is_refused_with_the_nearest_that_do(case: str) -> None:
    said, job, parts = UNFIT[case]
    hardware = row(**said)
    with pytest.raises(UserError) as refused:
        choose("box", hardware, job)
    text = str(refused.value)
    assert [
        part for part in [*parts, "do not fit the tag 'box'", f"{hardware.memory_gib:g} GiB"] if part not in text
    ] == [], text


def test_a_model_that_nothing_is_known_of_needs_a_row_that_says_everything() -> None:
    with pytest.raises(UserError, match=r"give precision, microbatch_rows in the tag's row"):
        choose("box", row(recompute="full"), None)
    said = {"precision": "fp32-master", "recompute": "none", "microbatch_rows": 2}
    assert said.items() <= choose("box", row(**said), None).how.items()


def test_a_reused_stage_is_no_reason_to_refuse_a_small_gpu(project: Path) -> None:
    from tests.tasks.test_plan import plan, pretend

    for planned in plan(project).values():
        pretend(planned)
    config = project / "run.yaml"
    tiny = row(memory_gib=1e-5, card=None)
    reused = make_plan(load_config(config), config, "box", tiny)
    assert all(planned.reused for planned in reused.values()) and reused["cpt"].unfit is not None
    (reused["cpt"].directory / "artifact.json").unlink()
    with pytest.raises(UserError, match="do not fit the tag 'box'"):
        make_plan(load_config(config), config, "box", tiny)


# --- speed -----------------------------------------------------------------------------------------------------------


def test_speed_scales_with_the_cards_rate_and_the_models_flops() -> None:
    setting = Setting("fsdp", "bf16-stochastic", "none", 2, 4096, accumulation=8)
    h200, a100 = (predict_speed(LLAMA_8B, setting, card, 16, ()).tokens_per_second for card in ("h200", "a100"))
    assert h200 / a100 == pytest.approx(989 / 312, rel=0.05)
    small = predict_speed(LLAMA_1B, setting, "h200", 16, ()).tokens_per_second
    assert small / h200 == pytest.approx(LLAMA_8B.flops_per_token(450) / LLAMA_1B.flops_per_token(450), rel=0.05)


def test_a_measured_run_predicts_itself() -> None:
    for run in measured():
        if not run.tells_speed:
            continue
        predicted = predict_speed(run.shape, run.setting, run.card, run.rows_per_step, (run,)).tokens_per_second
        assert predicted / run.setting.world_size == pytest.approx(run.tokens_per_second, rel=0.02)


@pytest.mark.parametrize("job", [JOB_1B, JOB_8B])
@pytest.mark.parametrize("backend", ["fsdp", "unsloth"])
def test_computing_again_is_never_predicted_to_be_faster(job: Job, backend: str) -> None:
    for precision in ("fp32-master", "bf16-stochastic"):
        setting = Setting(backend, precision, "none", 2, 4096, accumulation=8)
        kept = predict_speed(job.shape, setting, "h200", 16).tokens_per_second
        for recompute in ("pointwise", "selective", "full"):
            assert predict_speed(job.shape, replace(setting, recompute=recompute), "h200", 16).tokens_per_second <= kept


def test_rows_that_do_not_divide_cost_as_much_as_full_micro_batches() -> None:
    setting = Setting("fsdp", "bf16-stochastic", "none", 4, 4096, accumulation=2)
    five, eight = (predict_speed(LLAMA_8B, setting, "h200", rows, ()) for rows in (5, 8))
    assert five.step_seconds == eight.step_seconds
    assert five.tokens_per_second == pytest.approx(5 / 8 * eight.tokens_per_second)


@pytest.mark.parametrize(("tag", "dtype"), [("1xh200", "float32"), ("1x24gb", "bfloat16"), ("cpu", "float32")])
def test_an_evaluation_is_in_float32_where_that_fits(tag: str, dtype: str) -> None:
    """8B: 30 GiB in float32; a batch's 8 GiB come on top."""
    assert evaluation_dtype(load_hardware(tag), LLAMA_8B) == dtype
    assert evaluation_dtype(load_hardware(tag), None) == "float32"
