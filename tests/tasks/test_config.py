"""Bad configs are refused with file, line, key, value and what is allowed; good ones mean what they say."""

from pathlib import Path

import pytest

from tasks.config import load_config, load_hardware
from tasks.errors import UserError, parse
from tasks.hardware import AUTO
from tests.conftest import edit

# Nine lines of ten aliases each: the last would hold a thousand million values.
ALIASES = "n0: &n0 x\n" + "\n".join(
    f"n{n}: &n{n} [{', '.join([f'*n{n - 1}'] * 10)}]" for n in range(1, 10)) + "\nname: *n9"  # fmt: skip
# (text in the config, its replacement, what the message must say)
BAD = {
    "unknown key": ("learning_rate: 1.0e-3\n  batch_tokens: 512\nsft", "learnin_rate: 1.0e-3\n  batch_tokens: 512\nsft",
                    ["unknown key 'learnin_rate'", "did you mean 'learning_rate'", "run.yaml:14", "cpt.learnin_rate"]),
    "unknown section": ("evaluate:", "evalute:", ["unknown key 'evalute'", "did you mean 'evaluate'"]),
    "unknown key of a source": ("prompt: prompt", "promt: prompt", ["'promt'", "'prompt'", "sources.chats", "run.yaml:9"]),
    "wrong type": ("tokens: 4096", "tokens: many", ["tokens is 'many'", "run.yaml:11", "cpt.tokens", "integer"]),
    "replay of one": ("general: 0.25", "general: 1.0", ["cpt.replay.general", "1.0", "less than 1", "run.yaml:13"]),
    "negative replay": ("general: 0.25", "general: -0.1", ["greater than 0", "-0.1"]),
    "mix not one": ("{laws: 1.0}", "{laws: 0.7}", ["add up to 0.7", "cpt.mix", "run.yaml:12"]),
    "unknown source": ("{general: 0.25}", "{genral: 0.25}", ["'genral'", "did you mean 'general'", "run.yaml:13"]),
    "both budgets": ("epochs: 1", "epochs: 1\n  tokens: 100", ["exactly one of 'tokens' and 'epochs'", "key sft"]),
    "batch no multiple": ("batch_tokens: 512\nsft", "batch_tokens: 500\nsft", ["448 and 512", "cpt.batch_tokens"]),
    "less than a step": ("tokens: 4096", "tokens: 500", ["cpt.tokens is 500", "512 of one step", "run.yaml:11"]),
    "min_chars of chats": ("prompt: prompt", "min_chars: 9, prompt: prompt", ["is for documents", "sources.chats.min_chars"]),
    "files and hf": ("prompt: prompt", "hf: {id: a/b}, prompt: prompt", ["exactly one of 'files' and 'hf'", "chats"]),
    "no kind of record": (", prompt: prompt, completion: completion", "", ["exactly one kind of record", "sources.chats"]),
    "half a pair": (", completion: completion", "", ["'prompt' needs 'completion'"]),
    "key twice": ("name: tiny", "name: tiny\nname: other", ["'name' stands twice", "run.yaml:2"]),
    "learning rate as text": ("1.0e-3\n  batch_tokens: 512\nsft", "fast\n  batch_tokens: 512\nsft", ["'fast'", "number"]),
    "no yaml": ("name: tiny", "name: [tiny", ["not readable as YAML", "run.yaml"]),
    "task of both sides": ("general: []", "general: [tiny_bpb]", ["['tiny_bpb'] stand in both", "evaluate.general"]),
    "gate of a side without tasks": ("\nevaluate:", "\ngate: {max_general_drop: 0.1}\nevaluate:",
                                     ["evaluate.general names no task", "gate.max_general_drop"]),
    "gate without a number": ("\nevaluate:", "\ngate: {min_domain_gain: .nan}\nevaluate:", ["finite", "min_domain_gain"]),
    "a list within itself": ("name: tiny", "name: &x [*x]", ["contains itself", "run.yaml:1"]),
    "a mapping within itself": ("{laws: 1.0}", "&x {laws: *x}", ["contains itself", "run.yaml:12"]),
    "aliases of aliases": ("name: tiny", ALIASES, ["more than 100,000 values", "run.yaml:6"]),
    "a list as a key": ("name: tiny", "? [name]\n: tiny", ["a key is a list or a mapping", "run.yaml:1"]),
    "thousands": ("tokens: 4096", "tokens: 4k", ["tokens is '4k'", "write 4_000"]),
    "an exponent": ("tokens: 4096", "tokens: 4.1e3", ["an integer", "write 4_100"]),
    "beyond all numbers": ("tokens: 4096", "tokens: 1e999", ["tokens is '1e999'", "an integer"]),
    "a thousandth or a million": ("1.0e-3\n  batch_tokens: 512\nsft", "1m\n  batch_tokens: 512\nsft", ["'1m'", "a number"]),
    "half a token": ("tokens: 4096", "tokens: 4096.5", ["4096.5", "an integer"]),
    "comma of thousands": ("tokens: 4096", "tokens: 4,096", ["write 4_096"]),
    "per cent": ("general: 0.25", "general: 25 %", ["general is '25 %'", "a fraction", "write 0.25"]),
    "comma of decimals": ("1.0e-3\n  batch_tokens: 512\nsft", "0,001\n  batch_tokens: 512\nsft", ["is '0,001'", "write 0.001"]),
    "nothing": ("seed: 0", "seed:", ["seed is empty", "an integer", "run.yaml:3"]),
    "no flag": ("seq_len: 64", "seq_len: 64, hub: maybe", ["hub is 'maybe'", "true or false"]),
    "no name": ("name: tiny", "name: my run", ["name is 'my run'", "letters, digits", "run.yaml:1"]),
    "no name of a source": ("  laws: ", "  my laws: ", ["'my laws' is no name", "letters, digits"]),
    "no choice": ("epochs: 1", "epochs: 1\n  overflow: cut", ["overflow is 'cut'", "'error', 'drop' or 'truncate'"]),
    "list for a mapping": ("{laws: 1.0}", "[laws]", ["mix is ['laws']", "`key: value` lines"]),
    "text for a list": ("epochs: 1", "epochs: 1\n  adam_betas: 0.9", ["adam_betas is 0.9", "a list, as [a, b]"]),
    "short list": ("epochs: 1", "epochs: 1\n  adam_betas: [0.9]", ["adam_betas is [0.9]", "one value more", "sft.adam_betas"]),
    "mapping for files": ("laws:    {files: ", "laws:    {files: {a: 1}, text: text}  # ", ["files is {'a': 1}", "sources.laws.files"]),
    "tab": ("  tokens: 4096", "\ttokens: 4096", ["run.yaml:11", "indent with spaces"]),
    "deep": ("name: tiny", "name: " + "[" * 100_000, ["more than 50 lists or mappings", "run.yaml:1"]),
    "missing key": ("model: ", "#model: ", ["the key 'model' is missing"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_config_is_refused_with_place_and_remedy(project: Path, case: str) -> None:
    before, after, said = BAD[case]
    edit(project, before, after)
    with pytest.raises(UserError) as caught:
        load_config(project / "run.yaml")
    message = str(caught.value)
    assert [text for text in said if text not in message] == [], message
    assert len(message.splitlines()) <= 8  # one screen


def test_a_config_in_another_encoding_is_told_with_its_line(project: Path) -> None:
    config = project / "run.yaml"
    config.write_bytes(config.read_text().replace("\ncpt:", "\n# Zürich\ncpt:").encode("latin-1"))
    with pytest.raises(UserError, match=r"not UTF-8 \(byte 0xfc\)(.|\n)*run.yaml:10(.|\n)*save it as UTF-8"):
        load_config(config)


def test_a_gate_without_an_evaluation_is_refused(project: Path) -> None:
    config = project / "run.yaml"
    config.write_text(config.read_text().partition("\nevaluate:")[0] + "\ngate: {min_domain_gain: 0.02}\n")
    with pytest.raises(UserError, match=r"compares what 'evaluate' measures(.|\n)*run.yaml:21, key gate"):
        load_config(config)


def test_a_float_without_a_point_is_still_a_number(project: Path) -> None:
    edit(project, "1.0e-3\n  batch_tokens: 512\nsft", "2e-5\n  batch_tokens: 512\nsft")  # YAML reads 2e-5 as text
    assert load_config(project / "run.yaml").cpt.learning_rate == 2e-5


def test_shares_cover_the_whole_budget(project: Path) -> None:
    cpt = load_config(project / "run.yaml").cpt
    assert cpt.shares == {"laws": 0.75, "general": 0.25}


def test_an_unknown_tag_names_the_nearest(project: Path) -> None:
    with pytest.raises(UserError, match="unknown hardware tag 'cpu-2x', did you mean 'cpu-x2'"):
        load_hardware("cpu-2x")


def test_a_config_that_is_a_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        load_config(tmp_path)


def test_a_config_that_may_not_be_read_is_told(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:  # root, as in CI's containers, may read every file
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(UserError, match=r"run.yaml cannot be read: Permission denied"):
        load_config(project / "run.yaml")


def test_a_missing_config_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"did you mean 'configs/regulator.yaml'"):
        load_config("configs/regulater.yaml")


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.yaml")), ids=str)
def test_every_shipped_config_holds_to_the_schema(path: Path) -> None:
    if path.name == "hardware.yaml":
        assert load_hardware("cpu").device == "cpu"
    else:
        run = load_config(path)
        assert run.hardware == AUTO or load_hardware(run.hardware)


def test_an_error_survives_the_way_from_worker_to_screen() -> None:
    error = UserError("line 3: odd\n  second line", where="a.jsonl:3", allowed="x: y", todo="mend it")
    assert parse(str(error)).render() == str(error)


def test_an_anchor_may_be_used_many_times(project: Path) -> None:
    edit(project, "mix:    {laws: 1.0}\n  replay: {general: 0.25}\n  learning_rate: 1.0e-3",
         "mix:    {laws: 1.0}\n  replay: {general: 0.25}\n  learning_rate: &rate 1.0e-3")  # fmt: skip
    edit(project, "mix:    {chats: 1.0}\n  learning_rate: 1.0e-3", "mix:    {chats: 1.0}\n  learning_rate: *rate")
    run = load_config(project / "run.yaml")
    assert run.sft.learning_rate == run.cpt.learning_rate == 1e-3
