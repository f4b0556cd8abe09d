"""What loading a model for FSDP2 takes of a node's memory, by shards and whole: `python -m tests.benchmarks.loading`.

Real processes over gloo on this machine. Each says by how much its peak grew while the model was loaded and sharded:
what it held of its own (`RssAnon`, looked at every 2 ms), and that with the files' mapped pages, which all processes
share and the kernel may drop (`ru_maxrss`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

WAYS = ("shards", "whole")
WIDTH, MLP, VOCABULARY = 1024, 4096, 32_000
LAYER = 4 * WIDTH * WIDTH + 3 * WIDTH * MLP


def make_folder(folder: Path, millions: int, dtype: str = "float32") -> int:
    """A random Llama of about so many parameters, in two files; how many it has."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    layers = max(1, round((millions * 1e6 - 2 * WIDTH * VOCABULARY) / LAYER))
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=MLP, num_hidden_layers=layers,
                         num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=512)  # fmt: skip
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=model.num_parameters() * model.dtype.itemsize // 2)
    return int(model.num_parameters())


def load(folder: Path, way: str) -> tuple[Any, dict[str, float]]:
    """A sharded model in this process of torchrun's, and the GiB by which its peaks grew."""
    from accelerate import Accelerator
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from transformers import TrainingArguments

    from tasks.training import fsdp
    from tasks.training.model import load_model
    from tasks.training.precision import precision_policy

    how, precision = {"device": "cpu"}, precision_policy("fp32")
    arguments = TrainingArguments(str(folder / "out"), report_to="none", **fsdp.trainer_settings(how, precision))
    fsdp.before_trainer(arguments, precision)
    accelerator, before = Accelerator(cpu=True), peak_gib()
    with Watch() as watch:
        if way == "shards":
            model = fsdp.load_model(folder, precision, 512, how)
            assert fsdp.shard(model, accelerator), "it was loaded whole"
        else:
            model = fsdp2_prepare_model(accelerator, load_model(folder, precision, 512))
    return model, {"own": watch.peak_gib - watch.before_gib, "with files": peak_gib() - before}


def peak_gib() -> float:
    """The most memory that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def own_gib() -> float:
    """What this process holds now, without what it maps."""
    said = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(said["RssAnon"].split()[0]) / 2**20


class Watch:
    """The peak of what this process holds of its own, while a block runs."""

    def __enter__(self) -> Watch:
        self.before_gib = self.peak_gib = own_gib()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._look)
        self.thread.start()
        return self

    def _look(self) -> None:
        while not self.done.wait(0.002):
            self.peak_gib = max(self.peak_gib, own_gib())

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()


def measure(folder: Path, way: str, processes: int) -> list[dict[str, float]]:
    """GiB by which the peaks of each process grew."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
               "-m", "tests.benchmarks.loading", "--inside", way, "--folder", str(folder)]  # fmt: skip
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return [json.loads(file.read_text()) for file in sorted(folder.glob(f"{way}-*.json"))]


def inside(folder: Path, way: str) -> None:
    """One process: what it took, and digests of what it holds, are left in the folder."""
    import torch

    from tasks.training.moments import part_of

    model, grown_gib = load(folder, way)
    rank = os.environ["RANK"]
    held = {name: part_of(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    digests = {name: hashlib.sha256(part.detach().numpy().tobytes()).hexdigest() for name, part in held.items()}
    (folder / f"{way}-{rank}.json").write_text(json.dumps(grown_gib))
    (folder / f"{way}-{rank}.digests").write_text(json.dumps(digests))
    torch.distributed.destroy_process_group()


def main() -> None:
    """Both ways, one after the other."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--millions", type=int, default=400)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--inside", choices=WAYS)
    said = parser.parse_args()
    if said.inside:
        inside(said.folder, said.inside)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = make_folder(folder, said.millions, said.dtype)
        print(f"{parameters:,} parameters in {said.dtype}: {4 * parameters / 2**30:.2f} GiB in float32")
        for way in WAYS:
            peaks = measure(folder, way, said.processes)
            grown = [", ".join(f"{what} {gib:.2f}" for what, gib in one.items()) for one in peaks]
            print(f"{way:<7} peaks of each process grew by {'; '.join(grown)} GiB")


if __name__ == "__main__":
    main()
