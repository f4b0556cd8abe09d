"""What an order names is held against the disk: every file of every stage, each read once for its digest."""

from pathlib import Path

import pytest

from tasks import digests
from tasks.config import load_config, load_hardware
from tasks.digests import check_unchanged, files_named
from tasks.errors import UserError
from tasks.plan import Planned, make_plan
from tasks.stage import Order
from tests.conftest import CHATML, edit

NAMED = {
    "laws.jsonl": ({"prepare_cpt"}, "sources.laws.files"),
    "chats.jsonl": ({"prepare_sft"}, "sources.chats.files"),
    "template.jinja": ({"prepare_cpt", "prepare_sft"}, "model.chat_template"),
    "base/tokenizer.json": ({"prepare_cpt", "prepare_sft", "cpt", "evaluate_base"}, "model.path"),
    "base/model.safetensors": ({"cpt", "evaluate_base"}, "model.path"),
    "base/config.json": ({"cpt", "evaluate_base"}, "model.path"),
    "heldout.jsonl": ({"evaluate_base", "evaluate_cpt", "evaluate_sft"}, "evaluate.include_path"),
    "lm_eval/tiny_bpb.yaml": ({"evaluate_base", "evaluate_cpt", "evaluate_sft"}, "evaluate.include_path"),
}


@pytest.fixture
def plan(project: Path) -> dict[str, Planned]:
    (project / "template.jinja").write_text(CHATML)
    config = edit(project, f"{project}/base,", f"{project}/base, chat_template: {project}/template.jinja,")
    return make_plan(load_config(config), config, "cpu", load_hardware("cpu"))


def refused(plan: dict[str, Planned]) -> dict[str, UserError]:
    """The stages whose check fails."""
    found = {}
    for name, planned in plan.items():
        try:
            check_unchanged(planned.order, planned.directory.parent)
        except UserError as error:
            found[name] = error
    return found


@pytest.mark.parametrize("harm", ["changed", "deleted"])
@pytest.mark.parametrize("name", NAMED)
def test_whoever_reads_a_file_sees_that_it_is_another(
    project: Path, plan: dict[str, Planned], name: str, harm: str
) -> None:
    assert refused(plan) == {}
    file, (stages, key) = project / name, NAMED[name]
    file.unlink() if harm == "deleted" else file.write_bytes(file.read_bytes() + b"\n")
    found = refused(plan)
    assert set(found) == stages
    for error in found.values():
        assert error.where == key and error.what.startswith(str(file))
        assert error.what.endswith("changed after this run was planned")
        assert ("No such file" in error.what) == (harm == "deleted")


def test_what_is_unchanged_is_not_read_again(plan: dict[str, Planned], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> str:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr(digests, "file_sha256", refuse)
    assert refused(plan) == {}
    assert len({path for planned in plan.values() for path, _, _ in files_named(planned.order)}) >= len(NAMED)


def test_a_commit_of_the_hub_and_a_stage_before_are_no_files(plan: dict[str, Planned]) -> None:
    assert plan["sft"].order.what["init"]["key"] and list(files_named(plan["sft"].order)) == []
    what = {"init": {"hub": "some/model", "commit": "0123456789abcdef0123456789abcdef01234567"}}
    order = Order("cpt", "train", "tiny", what, {}, {"init": "cache/model"})
    assert list(files_named(order)) == []
