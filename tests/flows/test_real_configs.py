"""The configs for real models run the same road: a local folder of that architecture, tiny and random, stands in for the hub's."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.pipeline import load_plan, pipeline
from tasks.stage import read_artifact
from tests.conftest import ROOT, TASK, laws, make_model, write_lines

ARCHITECTURES = {"qwen3-0.6b": "qwen3", "llama-3.1-8b": "llama"}


def shrink(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The shipped config with local folders for the hub, and small budgets; what it does with them stays."""
    template = config["model"]["chat_template"]
    config["model"] = {"path": str(folder / "base"), "seq_len": 64, "chat_template": template}
    files = {"documents": "laws.jsonl", "general": "general.jsonl", "chats": "chats.jsonl", "alpaca": "alpaca.json"}
    for name, source in config["sources"].items():
        source.pop("hf", None)
        source["files"] = str(folder / files[name])
    config["cpt"] |= {"tokens": 3000, "batch_tokens": 512}
    config["sft"] |= {"epochs": 1, "batch_tokens": 512}
    config["evaluate"] |= {"domain": ["tiny_bpb"], "general": [], "include_path": str(folder / "lm_eval")}
    del config["gate"]["max_general_drop"]  # of the hub's general tasks, of which none is left
    return config | {"runs_dir": str(folder / "runs"), "hardware": "cpu"}


def write_data(folder: Path) -> None:
    write_lines(folder / "laws.jsonl", laws(300))
    write_lines(folder / "heldout.jsonl", laws(5, first=900))
    write_lines(
        folder / "general.jsonl", [{"text": f"The river of town {n} is {n * 3} miles long."} for n in range(300)]
    )
    chats = [{"messages": [{"role": "user", "content": f"Ratio {n}?"}, {"role": "assistant", "content": f"{n} percent."}]}
             for n in range(90)]  # fmt: skip
    write_lines(folder / "chats.jsonl", chats)
    alpaca = [{"instruction": "Say the ratio.", "input": f"Ratio {n}", "output": f"It is {n}."} for n in range(60)]
    (folder / "alpaca.json").write_text(json.dumps(alpaca))
    (folder / "lm_eval").mkdir()
    (folder / "lm_eval" / "tiny_bpb.yaml").write_text(TASK.format(folder=folder))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_shipped_config_runs_from_a_local_folder(tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_data(tmp_path)
    texts = [str(law["text"]) for law in laws(100)]
    make_model(tmp_path / "base", texts, ARCHITECTURES[name], chat_template=None)  # a base tokenizer: no template
    config = shrink(yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text()), tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))

    pipeline(str(tmp_path / "run.yaml"))

    plan = load_plan(str(tmp_path / "run.yaml"), None)
    assert all(planned.reused for planned in plan.values())
    rows = {stage: read_artifact(plan[stage].directory)["counts"]["new_embedding_rows"] for stage in ("cpt", "sft")}
    assert rows == {"cpt": 0, "sft": 2}  # <|im_start|> and <|im_end|>, which the template brought for the chats
    folder = plan["sft"].directory / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == ARCHITECTURES[name]
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert "generation" in tokenizer.chat_template
    assert "| new embedding rows | 0 | 2 |" in (plan["report"].directory / "report.md").read_text()
