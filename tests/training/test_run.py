"""A stage trained in this process: layouts, metrics, export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.errors import UserError
from tasks.stage import write_json
from tasks.training.__main__ import loss_rose
from tasks.training.checkpoint import list_checkpoints, step_of
from tasks.training.export import moved_share
from tasks.training.metrics import METRICS, read_metrics
from tasks.training.run import RESUMES
from tasks.training.schedule import lr_factor
from tests.training.conftest import (
    WHAT,
    largest_difference,
    make_documents,
    make_model,
    make_prepared,
    make_stage,
    make_tokenizer,
    pack,
    train_here,
    weights,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, base: Path, prepared: Path) -> tuple[Path, dict[str, object]]:
    """A finished stage, micro-batches of one row, and its counts."""
    directory = make_stage(tmp_path_factory.mktemp("runs"), base, prepared)
    return directory, train_here(directory)


@pytest.mark.parametrize("microbatch_rows", [2, 3, 4])
def test_any_split_of_a_step_gives_the_same_weights(
    trained: tuple[Path, dict[str, object]], base: Path, prepared: Path, tmp_path: Path, microbatch_rows: int
) -> None:
    targets = [sum(label != -100 for label in row["labels"]) for row in pack(make_documents(120))[:4]]
    assert len(set(targets)) > 1, "rows of equal targets would hide a wrong denominator"
    directory = make_stage(tmp_path, base, prepared, {"microbatch_rows": microbatch_rows})
    train_here(directory)
    assert largest_difference(directory, trained[0]) < 1e-6
    ours, reference = read_metrics(directory), read_metrics(trained[0])
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in reference], abs=1e-6)
    assert [line["tokens"] for line in ours] == [line["tokens"] for line in reference]


def test_training_equals_a_plain_loop(trained: tuple[Path, dict[str, object]], base: Path, prepared: Path) -> None:
    """The promise of the schedule, the denominator and the optimizer's settings, against torch alone."""
    rows = pack(make_documents(120))[:42]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").train()
    groups = [[p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim == 1]]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.01}, {"params": groups[1], "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    for step in range(11):
        losses = []
        for row in rows[4 * step : 4 * step + 4]:
            start = 0
            for length in row["seq_lengths"]:  # every document alone
                ids = torch.tensor([row["input_ids"][start : start + length]])
                labels = torch.tensor(row["labels"][start + 1 : start + length])
                logits = model(ids, use_cache=False).logits[0, :-1]
                losses.append(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="none"))
                losses[-1] = losses[-1][labels != -100]
                start += length
        loss = torch.cat(losses).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * lr_factor(step, 11, 0.2, 0.1)
        optimizer.step()
        optimizer.zero_grad()
        assert read_metrics(trained[0])[step]["loss"] == pytest.approx(loss.item(), abs=2e-6)
    reference = dict(model.named_parameters())
    # Adam divides by the root of tiny second moments, so the last bits of a sum may grow; 1e-5 is 1 % of one step.
    assert all((tensor - reference[name]).abs().max() < 1e-5 for name, tensor in weights(trained[0]).items())


def test_metrics_hold_one_line_a_step_with_the_schedule(
    trained: tuple[Path, dict[str, object]], prepared: Path
) -> None:
    lines = read_metrics(trained[0])
    rows = pack(make_documents(120))[:42]
    assert [line["step"] for line in lines] == list(range(1, 12))
    assert [line["lr"] for line in lines] == [1e-3 * lr_factor(step, 11, 0.2, 0.1) for step in range(11)]
    assert lines[-1]["lr"] == WHAT["learning_rate"] * WHAT["min_lr_ratio"]
    assert sum(line["tokens"] for line in lines) == sum(len(row["input_ids"]) for row in rows)
    assert len(rows[40:]) == 2 and lines[-1]["tokens"] == sum(len(row["input_ids"]) for row in rows[40:])
    for line in lines:
        assert line["grad_norm"] > 0 and line["tokens_per_second"] > 0 and line["supervised_tokens"] < line["tokens"]
        assert set(line["loss_by_source"]) == {"docs", "chats"}
        assert min(line["loss_by_source"].values()) <= line["loss"] <= max(line["loss_by_source"].values())


def test_tensorboard_tells_the_same_as_the_metrics(trained: tuple[Path, dict[str, object]]) -> None:
    board = EventAccumulator(str(trained[0] / "tensorboard"))
    board.Reload()
    lines = read_metrics(trained[0])
    for tag in ("loss", "lr", "grad_norm", "tokens_per_second"):
        assert [event.value for event in board.Scalars(tag)] == pytest.approx([line[tag] for line in lines])
    assert [event.value for event in board.Scalars("loss_by_source/chats")] == pytest.approx(
        [line["loss_by_source"]["chats"] for line in lines]
    )
    assert [event.value for event in board.Scalars("weights_moved_share")] == [trained[1]["weights_moved_share"]]


def test_counts_are_those_of_the_rows(trained: tuple[Path, dict[str, object]]) -> None:
    counts = trained[1]
    lines = read_metrics(trained[0])
    assert counts["steps"] == 11
    assert counts["tokens"] == sum(line["tokens"] for line in lines)
    assert counts["first_loss"] == lines[0]["loss"] and counts["final_loss"] == lines[-1]["loss"]
    assert loss_rose(counts) == "" and "from 2.000 at the first step to 2.300" in loss_rose(
        counts | {"first_loss": 2.0, "final_loss": 2.3}
    )
    assert (counts["wrapper"], counts["resumed_from"], counts["new_embedding_rows"]) == ("none", [], 0)
    assert counts["attention"] == "steep_isolated"


def test_the_export_is_a_plain_model_folder(trained: tuple[Path, dict[str, object]], base: Path) -> None:
    folder = trained[0] / "model"
    assert not list(folder.glob("*.bin")) and not list(folder.glob("*.md"))
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o644}
    config = json.loads((folder / "config.json").read_text())
    assert config["use_cache"] is True and config["dtype"] == "float32"
    assert config["architectures"] == ["LlamaForCausalLM"] and config["tie_word_embeddings"] is True
    for file in folder.glob("*.json"):
        assert str(base.parent) not in file.read_text(), f"{file.name} tells where the base stood"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model.lm_head.weight, weights(trained[0])["model.embed_tokens.weight"])
    assert model.config._attn_implementation != "steep_isolated"
    assert model.generation_config.eos_token_id == 1
    assert AutoTokenizer.from_pretrained(folder).chat_template == make_tokenizer().chat_template
    assert not (trained[0] / ".model.writing").exists()


def test_moved_share_counts_changed_weights_and_ignores_added_rows(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    for folder in (before, after):
        folder.mkdir()
    save_file({"a": torch.zeros(4, 5).bfloat16(), "b": torch.ones(20)}, before / "model.safetensors")
    moved = torch.zeros(6, 5)
    moved[0, :3] = 1e-30
    save_file({"a": moved}, after / "one.safetensors")
    save_file({"b": torch.ones(20)}, after / "two.safetensors")
    assert moved_share(before, after) == 3 / 40


def test_added_tokens_travel_from_the_tokenizer_to_the_export(tmp_path: Path) -> None:
    init = make_model(tmp_path / "model", tied=False)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    rows = pack(make_documents(8))
    rows[0]["input_ids"][5] = rows[0]["labels"][5] = 128
    prepared = make_prepared(tmp_path / "prepared", rows, tokenizer, added_tokens=["<|end|>"], end_of_turn="<|end|>")
    directory = make_stage(tmp_path, init, prepared)
    counts = train_here(directory)
    assert counts["new_embedding_rows"] == 1
    assert weights(directory)["lm_head.weight"].shape[0] == 129
    model = AutoModelForCausalLM.from_pretrained(directory / "model")
    assert model.config.vocab_size == 129
    assert model.generation_config.eos_token_id == [1, 128]
    assert 0.9 < counts["weights_moved_share"] <= 1


@pytest.mark.parametrize(("cadence", "kept"), [
    ({"every_steps": 4, "every_minutes": None, "keep_last": 3}, [11, 8, 4]),
    ({"every_steps": None, "every_minutes": 1e-9, "keep_last": 2}, [11, 10]),
    ({"every_steps": None, "every_minutes": 30.0, "keep_last": 2}, [11]),
])  # fmt: skip
def test_checkpoints_come_by_steps_or_minutes_and_at_the_end(
    tmp_path: Path, base: Path, prepared: Path, cadence: dict[str, object], kept: list[int]
) -> None:
    directory = make_stage(tmp_path, base, prepared, {"checkpoint": cadence})
    train_here(directory)
    assert [step_of(path) for path in list_checkpoints(directory)] == kept


HARMED_LOGS = {  # what became of the logs while nothing ran, and the resumes that are still known
    "nothing": (lambda text: text, [5, 8]),
    "a bit in line 2": (lambda text: text.replace('{"step": 2', '{"sdep": 2'), [5, 8]),
    "a letter of a key": (lambda text: text.replace('"supervised_tokens"', '"supervised_tokenS"', 1), [5, 8]),
    "another number": (lambda text: text.replace('"seconds": ', '"seconds": 9', 1), [5, 8]),
    "no line": (lambda text: "", [5, 8]),
    "the list of resumes": (lambda text: text, [8]),
}


@pytest.mark.parametrize("harm", HARMED_LOGS)
def test_a_log_that_rots_costs_no_checkpoint(
    trained: tuple[Path, dict[str, object]], interrupted: Path, tmp_path: Path, harm: str
) -> None:
    directory = Path(shutil.copytree(interrupted, tmp_path / "runs" / interrupted.name))
    metrics, (change, resumed_from) = directory / METRICS, HARMED_LOGS[harm]
    before = metrics.read_text()
    metrics.write_text(change(before))
    assert harm in ("nothing", "the list of resumes") or metrics.read_text() != before
    if harm == "the list of resumes":
        (directory / RESUMES).write_text("[\n  5\n")
    assert train_here(directory)["resumed_from"] == resumed_from
    ours, reference = read_metrics(directory), read_metrics(trained[0])
    for name in ("step", "loss", "lr", "tokens", "supervised_tokens"):
        assert [line[name] for line in ours] == [line[name] for line in reference]
    assert [line["seconds"] for line in ours[:8]] == [json.loads(line)["seconds"] for line in before.split("\n")[:8]]
    assert not list(directory.glob("checkpoints/damaged-*"))


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, base: Path, prepared: Path) -> Path:
    """A stage that was resumed from step 5, and killed behind the checkpoint of step 8."""
    cadence = {"checkpoint": {"every_steps": 1, "every_minutes": None, "keep_last": 20}}
    directory = make_stage(tmp_path_factory.mktemp("interrupted"), base, prepared, cadence)
    train_here(directory)
    for checkpoint in list_checkpoints(directory):
        if step_of(checkpoint) not in (5, 8):
            shutil.rmtree(checkpoint)
    shutil.rmtree(directory / "model")
    write_json(directory / RESUMES, [5])
    return directory


def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path: Path, base: Path, prepared: Path) -> None:
    init = tmp_path / "broken"
    init.mkdir()
    for file in base.iterdir():
        (init / file.name).write_bytes(file.read_bytes())
    tensors = load_file(init / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, init / "model.safetensors", {"format": "pt"})
    directory = make_stage(tmp_path, init, prepared)
    with pytest.raises(UserError, match="step 1 is not finite: loss nan"):
        train_here(directory)
    assert not (directory / "model").exists() and list_checkpoints(directory) == []
    assert read_metrics(directory) == []


def test_masters_in_float32_learn_what_float32_learns(
    trained: tuple[Path, dict[str, object]], base: Path, prepared: Path, tmp_path: Path
) -> None:
    directory = make_stage(tmp_path, base, prepared, {"precision": "fp32-master"})
    train_here(directory)
    ours, reference = read_metrics(directory), read_metrics(trained[0])
    assert [line["loss"] for line in ours] != [line["loss"] for line in reference], "nothing ran in bf16"
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in reference], abs=0.01)
    assert {tensor.dtype for tensor in weights(directory).values()} == {torch.float32}
