"""One run of the GPU benchmark in a process of its own: `python -m tests.benchmarks.gpu.case CASE.json OUT.json`.

`tool` says whose code trains: `steep` is our worker up to the export; `trl` and `unsloth` are those tools as their users
call them, on the same rows, the same model folder and the same tokens a step.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

WARMUP_STEPS = 2
WHAT = {"stage": "cpt", "seq_len": 4096, "learning_rate": 1e-5, "min_lr_ratio": 0.1, "warmup_ratio": 0.1,
        "weight_decay": 0.0, "adam_betas": [0.9, 0.95], "max_grad_norm": 1.0, "seed": 0, "init": {"sha": "random"},
        "rows": {"key": "benchmark"}}  # fmt: skip
HOW = {"tag": "benchmark", "backend": "fsdp", "device": "cuda", "processes": 1, "nodes": 1, "precision": "bf16-stochastic",
       "recompute": "none", "compile": True, "microbatch_rows": 2, "offload": "none",
       "checkpoint": {"every_steps": None, "every_minutes": None, "keep_last": 1}}  # fmt: skip


def run_steep(case: dict[str, Any], work: Path) -> dict[str, Any]:
    """Our worker, from its order to its last step."""
    from tasks.stage import Order, write_order

    how = HOW | {name: case[name] for name in HOW if name in case}
    what = (
        WHAT
        | case.get("what", {})
        | {"batch_tokens": case["rows_per_step"] * case["seq_len"], "seq_len": case["seq_len"]}
    )
    order = Order("cpt", "train", "benchmark", what | {"case": case["name"]}, how,
                  {"init": case["model"], "rows": case["prepared"]})  # fmt: skip
    backend = import_module(f"tasks.training.{how['backend']}")
    backend.start_process(how)
    from tasks.training import run, trainer

    directory = write_order(order, work) if backend.rank() == 0 else order.directory(work)
    while not (directory / "order.json").exists():
        time.sleep(0.1)
    trainer.RowTrainer._save_checkpoint = lambda *_: None  # type: ignore[method-assign]  # 48 GB that we do not time
    run.check_init = lambda *_: None  # type: ignore[assignment]  # no checkpoints, so no room for them
    steps = _Steps()
    assemble = run.assemble
    run.assemble = lambda *args: _watched(assemble(*args), steps)  # type: ignore[assignment]
    fitted = run.fit(directory, order, backend)
    more = _after(case, fitted, backend)
    lines = run.read_metrics(directory) if backend.rank() == 0 else []
    return {"losses": [line["loss"] for line in lines], "grad_norms": [line["grad_norm"] for line in lines],
            **more, **steps.result(case)}  # fmt: skip


def _after(case: dict[str, Any], fitted: Any, backend: Any) -> dict[str, Any]:
    """Loss on held-out rows in nats a token, the share of weights that moved, and the weights, where a case asks."""
    import torch

    from tasks.training.loss import token_losses
    from tasks.training.rows import load_rows

    found: dict[str, Any] = {}
    trainer = fitted.trainer
    if case.get("held_out"):
        rows, total, count = load_rows(Path(case["held_out"]) / "rows.arrow", filler_token=1), 0.0, 0
        trainer.model.eval()
        with torch.no_grad():
            for number in range(len(rows) - 1):
                batch = trainer._prepare_inputs(trainer.data_collator([rows[number]]))
                with trainer.compute_loss_context_manager():
                    total += float(token_losses(trainer.model_wrapped, batch)[0])
                count += len(batch["targets"])
        found["held_out"] = total / count
    if case.get("moved") and backend.world_size() == 1:
        from safetensors.torch import load_file

        before = {k: v for file in Path(case["model"]).glob("*.safetensors") for k, v in load_file(file).items()}
        pairs = [
            (before[n].to(p.device).to(p.dtype), p.detach()) for n, p in trainer.model.named_parameters() if n in before
        ]
        found["moved"] = sum(int((a != b).sum()) for a, b in pairs) / sum(b.numel() for _, b in pairs)
    if case.get("save"):
        trainer.model.save_pretrained(case["save"])
        fitted.inputs.tokenizer.save_pretrained(case["save"])
    return found


def run_bare(case: dict[str, Any], work: Path) -> dict[str, Any]:
    """The same model, layers, loss, optimizer and rows as ours in the plainest loop: what the worker itself costs."""
    from tasks.training import fsdp

    fsdp.start_process(HOW)
    import torch

    from tasks.training.attention import attention_plan
    from tasks.training.loss import token_losses
    from tasks.training.model import load_model, prepare_model
    from tasks.training.precision import precision_policy
    from tasks.training.rows import load_rows, make_collate
    from tasks.training.stochastic import StochasticAdamW8bit

    seq_len, micro = case["seq_len"], case["microbatch_rows"]
    model: Any = load_model(Path(case["model"]), precision_policy("bf16-stochastic"), seq_len).to("cuda").train()
    prepare_model(model, HOW)
    optimizer = StochasticAdamW8bit(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0)
    rows = load_rows(Path(case["prepared"]) / "rows.arrow", filler_token=1)
    plan = attention_plan(model.config._attn_implementation, "cuda", bf16=True)
    if not case.get("isolated", True):  # a row is one document for the attention, as where borders are ignored
        by_document = plan
        plan = lambda lengths: by_document([seq_len] * (sum(lengths) // seq_len))  # noqa: E731
    collate = make_collate(plan, fill_to=micro * seq_len, longest=seq_len)
    steps, losses = _Steps(), []
    for step in range(case["steps"]):
        torch.cuda.synchronize()
        began, total, first = time.monotonic(), 0.0, step * case["rows_per_step"]
        for at in range(first, first + case["rows_per_step"], micro):
            batch = collate([rows[number] for number in range(at, at + micro)])
            batch = {k: v.to("cuda", non_blocking=True) if hasattr(v, "to") else v for k, v in batch.items()}
            loss = token_losses(model, batch)[0] / (case["rows_per_step"] * seq_len)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(total))
        steps.optimizer.append(0.0)
        steps.steps.append(time.monotonic() - began)
    return {"losses": losses, **steps.result(case)}


def run_peer(case: dict[str, Any], work: Path) -> dict[str, Any]:
    """TRL or Unsloth as one finds them described, with our rows and AdamW's settings."""
    if case["tool"] == "unsloth":
        import unsloth  # noqa: F401
    import datasets
    import torch
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]

    rows = datasets.Dataset.from_file(str(Path(case["prepared"]) / "rows.arrow"))
    rows = rows.select_columns(["input_ids", "labels", "seq_lengths"])
    settings: dict[str, Any] = dict(case.get("settings", {}))
    recompute = case["recompute"]
    if case["tool"] == "unsloth":
        from unsloth import FastLanguageModel

        model, tokenizer = FastLanguageModel.from_pretrained(
            case["model"], max_seq_length=case["seq_len"], dtype=torch.bfloat16, full_finetuning=True, load_in_4bit=False,
            use_gradient_checkpointing="unsloth" if recompute == "unsloth" else False, local_files_only=True,
            use_exact_model_name=True,
        )  # fmt: skip
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(case["model"])
        dtype = getattr(torch, case.get("dtype", "bfloat16"))
        model = AutoModelForCausalLM.from_pretrained(
            case["model"], dtype=dtype, attn_implementation=case.get("attention")
        )
        settings["use_liger_kernel"] = True
    config = SFTConfig(
        output_dir=str(work / "peer"), max_steps=case["steps"], per_device_train_batch_size=case["microbatch_rows"],
        gradient_accumulation_steps=case["rows_per_step"] // (case["microbatch_rows"] * case.get("processes", 1)),
        learning_rate=WHAT["learning_rate"], weight_decay=0.0, adam_beta1=0.9, adam_beta2=0.95, max_grad_norm=1.0,
        lr_scheduler_type="cosine", warmup_steps=0, bf16=True, logging_steps=1, save_strategy="no", report_to="none",
        optim="adamw_torch_fused", packing=False, max_length=None, dataset_kwargs={"skip_prepare_dataset": True},
        gradient_checkpointing=recompute != "none", remove_unused_columns=False, disable_tqdm=True, seed=0,
        **({"padding_free": True} if case.get("padding_free", True) else {}), **settings,
    )  # fmt: skip
    if case["tool"] == "unsloth":
        config.gradient_checkpointing = recompute != "none"
    steps = _Steps()
    trainer = SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
    _watched(trainer, steps)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {"losses": losses, **steps.result(case)}


class _Steps:
    """Times of steps, of the optimizer within them, and the memory they took.

    A step lasts from the end of the one before: reading its rows and writing its log take time too.
    """

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.optimizer: list[float] = []

    def result(self, case: dict[str, Any]) -> dict[str, Any]:
        import torch

        tokens = case["rows_per_step"] * case["seq_len"] / case.get("processes", 1)
        timed = self.steps[WARMUP_STEPS:] or self.steps
        seconds = statistics.median(timed)
        return {
            "step_seconds": [round(x, 4) for x in self.steps],
            "tokens_per_second": round(tokens / seconds, 1),
            "optimizer_share": round(statistics.median(self.optimizer[WARMUP_STEPS:] or self.optimizer) / seconds, 4),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
            "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
            "host_gib": round(_own_host_bytes() / 2**30, 2),
        }


def _own_host_bytes() -> int:
    """What this process holds of the host's memory, files mapped by it left out."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))


def _watched(trainer: Any, steps: _Steps) -> Any:
    import torch
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def now(self) -> float:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return time.monotonic()

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.began = self.now()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.optimizer_began = self.now()

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            steps.optimizer.append(self.now() - self.optimizer_began)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            ended = self.now()
            steps.steps.append(ended - self.began)
            self.began = ended

    trainer.add_callback(Watch())
    return trainer


def main(case_path: Path, out_path: Path) -> None:
    """Run one case; rank 0 writes what came out."""
    case = json.loads(case_path.read_text())
    os.environ.setdefault("OMP_NUM_THREADS", "4")
    began = time.monotonic()
    run = {"steep": run_steep, "bare": run_bare}.get(case["tool"], run_peer)
    result = run(case, out_path.parent)
    if os.environ.get("RANK", "0") == "0":
        out_path.write_text(json.dumps(result | {"wall_seconds": round(time.monotonic() - began, 1)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
