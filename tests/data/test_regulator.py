"""The embedded example's data: reproducible, held out, and scored as it says."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import yaml

from data.regulator import exercises, general
from data.regulator.__main__ import FOLDER, content, main
from data.regulator.world import CODES, FORMS, PARCELS, RARE_FORMS, RATIOS, RATIOS_OF_FORM, Rule, value_near

TRAINING = ("regulations", "general", "reports")
TASKS = Path("configs/lm_eval")


def records(name: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text().splitlines()]


def test_generator_writes_the_shipped_bytes(tmp_path: Path) -> None:
    main(tmp_path)
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.jsonl"))
    assert made == sorted(path.relative_to(FOLDER) for path in FOLDER.rglob("*.jsonl")) and len(made) == 7
    for name in made:
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes(), name


@pytest.mark.parametrize("name", TRAINING)
def test_nothing_held_out_is_trained_on(name: str) -> None:
    training, held_out = ({content(record) for record in records(where)} for where in (name, f"eval/{name}"))
    assert len(training) > 3000 and len(held_out) >= 100
    assert not training & held_out


def test_held_out_reports_are_about_rare_forms_and_training_hardly_shows_them() -> None:
    held_out = [record["form"] for record in records("eval/reports")]
    assert set(held_out) == set(RARE_FORMS)
    asked = [content(record) for record in records("reports")]
    rare = [text for text in asked if text.split(",")[0].removeprefix("Form ") in RARE_FORMS]
    assert 0.03 < len(rare) / len(asked) < 0.05
    for form in RARE_FORMS:
        for ratio in RATIOS_OF_FORM[form]:
            assert sum(f"\n{ratio.code} " in text for text in asked) >= 5


def test_answers_are_right() -> None:
    by_code = {ratio.code: ratio for ratio in RATIOS}
    num_breaches = 0
    for record in records("eval/reports"):
        question, answer = (message["content"] for message in record["messages"])
        rows = dict(line.split() for line in question.splitlines()[1:])
        breached = [code for code, value in rows.items() if by_code[code].breached_by(int(value))]
        assert record["violations"] == breached
        assert f"Violations: {', '.join(breached) or 'none'}\nDirective: {record['directive']}" in answer
        assert all(str(by_code[code].article) in record["directive"] for code in breached)
        num_breaches += len(breached)
    assert 0.25 < num_breaches / (4 * len(records("eval/reports"))) < 0.4


def test_general_text_and_exercises_hold_no_fact_of_the_regulations() -> None:
    codes = {ratio.code for ratio in RATIOS}
    assert not codes & {parcel.code for parcel in PARCELS} and len(set(CODES)) == len(CODES)
    text = " ".join(record["text"] for record in records("general"))
    assert not any(code in text for code in CODES)
    rng = random.Random(0)
    for exercise in exercises.KINDS:
        for text in (exercise(rng) for _ in range(200)):
            assert "article" not in text.lower() or exercise is exercises._spelling
            if exercise in (exercises._parcel_rules, exercises._parcel_list):
                assert not any(code in text for code in codes)


def test_limit_itself_is_allowed_and_values_fall_on_the_side_asked_for() -> None:
    rng = random.Random(0)
    for side in ("min", "max"):
        rule = Rule("XXR", side, 50, 101, "", 10)
        assert not rule.breached_by(50)
        assert all(rule.breached_by(value_near(rng, rule, 1.0)) for _ in range(200))
        assert not any(rule.breached_by(value_near(rng, rule, 0.0)) for _ in range(200))


def test_every_form_has_its_ratios_and_every_kind_of_document_its_weight() -> None:
    assert all(len(RATIOS_OF_FORM[form]) == 5 for form in FORMS)
    assert len(general.KINDS) == len(general.WEIGHTS) and len(exercises.KINDS) == len(exercises.WEIGHTS)


def test_every_task_reads_a_file_that_ships() -> None:
    files = sorted(TASKS.glob("*.yaml"))
    assert len(files) == 4
    for file in files:
        text = file.read_text().replace("!function ", "")
        assert Path(yaml.safe_load(text)["dataset_kwargs"]["data_files"]["test"]).is_file()
