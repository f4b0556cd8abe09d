"""Tables of the plan: `python -m tests.benchmarks.plan`; with `--readme` also into the README. Runs anywhere.

Predicted against measured memory and speed for every run of `configs/measurements/`, and which clusters hold 7B, 13B
and 70B parameters. Exits with 1 when a prediction of memory is more than 8 % off.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tasks.choose import HEADROOM, Choice, Job, choose
from tasks.hardware import load_hardware, tags
from tasks.host import host_bytes
from tasks.memory import GIB, Setting, predict
from tasks.model_shape import ModelShape, shape_of
from tasks.speed import Measured, measured, predict_speed
from tests.benchmarks.gpu import tables as gpu

README = Path(__file__).resolve().parent.parent.parent / "README.md"
MOST_OFF = 0.08
FEWEST_OF_A_SWEEP, SWEPT_SEQ_LEN = 3, 4096
# bf16 weights and gradients, float32 moments, no master copy: bytes a parameter of the textbook's 84 GB for 7B.
RULE_OF_THUMB = (2.0, 2.0, 8.0)


def _llama_2(hidden: int, mlp: int, layers: int, heads: int, key_heads: int) -> ModelShape:
    return shape_of({"model_type": "llama", "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
                     "num_attention_heads": heads, "num_key_value_heads": key_heads, "vocab_size": 32_000,
                     "tie_word_embeddings": False})  # fmt: skip


LLAMA_2 = {
    "7B": _llama_2(4096, 11_008, 32, 32, 32),
    "13B": _llama_2(5120, 13_824, 40, 40, 40),
    "70B": _llama_2(8192, 28_672, 80, 64, 8),
}
# name, GPUs, GPUs of a node, GiB that torch sees of one
CLUSTERS = (
    ("4xA100-40", 4, 4, 39.4),
    ("8xA100-40", 8, 8, 39.4),
    ("8xA100-80", 8, 8, 79.0),
    ("16xH100-80", 16, 8, 79.0),
)
Cluster = tuple[str, int, int, float]
TEXTBOOK = "12 bytes"
POLICIES = ((TEXTBOOK, "none"), ("fp32-master", "none"), ("bf16-stochastic", "none"), ("fp32-master", "cpu"))


def state_gigabytes(num_parameters: float, bytes_a_parameter: tuple[float, ...]) -> float:
    """Weights, gradients and optimizer of a model, in GB."""
    return num_parameters * sum(bytes_a_parameter) / 1e9


def on_cluster(cluster: Cluster, precision: str, offload: str) -> Setting:
    """Rows of 4096, one at a time, every layer computed again."""
    return Setting("fsdp", precision, "full", 1, 4096, cluster[1], offload, accumulation=4)


def gib_on(shape: ModelShape, cluster: Cluster, policy: str, offload: str) -> float:
    """Predicted GiB of one GPU; the textbook's policy is bf16 with 4 bytes a parameter more for its moments."""
    textbook = policy == TEXTBOOK
    total = predict(shape, on_cluster(cluster, "bf16" if textbook else policy, offload)).total
    return (total + textbook * (sum(RULE_OF_THUMB) - 8) * shape.parameters / cluster[1]) / GIB


def holds(shape: ModelShape, cluster: Cluster, policy: str, offload: str) -> bool:
    """Whether a model trains there with the plan's headroom; the host's memory is not asked."""
    return gib_on(shape, cluster, policy, offload) <= cluster[3] * (1 - HEADROOM)


def cluster_table() -> str:
    """Model x policy, one column a cluster: GiB a GPU, and on the host of a node."""
    lines = ["| model | policy | offload | " + " | ".join(name for name, *_ in CLUSTERS) + " |", "|---" * 7 + "|"]
    for model, shape in LLAMA_2.items():
        for policy, offload in POLICIES:
            cells = [_cell(shape, cluster, policy, offload) for cluster in CLUSTERS]
            lines.append(f"| {model} | {policy} | {offload} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(shape: ModelShape, cluster: Cluster, policy: str, offload: str) -> str:
    text = f"{gib_on(shape, cluster, policy, offload):.0f}"
    if offload == "cpu":
        text += f" + {host_bytes(shape, on_cluster(cluster, policy, offload), cluster[2]) / GIB:,.0f} host"
    return f"**{text}**" if holds(shape, cluster, policy, offload) else f"{text}, no"


def measured_table(runs: tuple[Measured, ...]) -> str:
    """Predicted against measured; speed from the other runs only, so that none is its own prediction."""
    lines = [
        "| run | GiB measured | GiB predicted | off | tokens/s a GPU | predicted from the others | off |",
        "|---" * 7 + "|",
    ]
    for run in runs:
        gib, known = predict(run.shape, run.setting).total / GIB, "memory" in run.valid
        speed = _speed_from_others(run, runs)
        peak = (
            f"{run.peak_gib:.1f} | {gib:.1f} | {gib / run.peak_gib - 1:+.1%}"
            if known
            else f"not measured | {gib:.1f} | "
        )
        lines.append(f"| {run.name} | {peak} | {speed} |")
    return "\n".join(lines)


def _speed_from_others(run: Measured, runs: tuple[Measured, ...]) -> str:
    if not run.tells_speed:
        return "not timed | | "
    others = tuple(other for other in runs if other is not run)
    speed = predict_speed(run.shape, run.setting, run.card, run.rows_per_step, others)
    rate = speed.tokens_per_second / run.setting.world_size
    return f"{run.tokens_per_second:,.0f} | {rate:,.0f} | {rate / run.tokens_per_second - 1:+.1%}"


def sweeps(runs: tuple[Measured, ...]) -> dict[tuple[str, str], list[Measured]]:
    """(tag, model) -> the settings of it that were measured, where there are enough to choose from; the fastest first."""
    found: dict[tuple[str, str], list[Measured]] = {}
    for run in [run for run in runs if "speed" in run.valid]:
        for tag in tags():
            row, setting = load_hardware(tag), run.setting
            # On one GPU the backend fsdp runs the same layers, within 1 % as fast: its settings are a choice there too.
            backends = {row.backend, "fsdp"} if row.world_size == 1 else {row.backend}
            here = (row.world_size, row.card) == (setting.world_size, run.card) and setting.backend in backends
            if here and row.offload == setting.offload and setting.seq_len == SWEPT_SEQ_LEN:
                found.setdefault((tag, f"{run.shape.parameters / 1e9:.1f}B"), []).append(run)
    enough = {key: group for key, group in found.items() if len(group) >= FEWEST_OF_A_SWEEP}
    return {key: sorted(group, key=lambda run: -run.tokens_per_second) for key, group in enough.items()}


def chosen(tag: str, group: list[Measured]) -> Choice:
    """What the plan chooses for a sweep's model and tag."""
    job = Job(group[0].shape, SWEPT_SEQ_LEN, group[0].rows_per_step)
    return choose(tag, load_hardware(tag), job)


def is_chosen(run: Measured, choice: Choice) -> bool:
    """Whether a measured run has the chosen settings."""
    own, other = run.setting, choice.setting
    assert other is not None
    chosen_ones = (other.backend, other.precision, other.recompute, other.microbatch_rows)
    return (own.backend, own.precision, own.recompute, own.microbatch_rows) == chosen_ones


def sweep_table(runs: tuple[Measured, ...]) -> str:
    """Every setting of a sweep with what it reached; the chosen one is bold."""
    lines = ["| tag | model | setting | tokens/s a GPU | of the best | GiB |", "|---" * 6 + "|"]
    for (tag, model), group in sweeps(runs).items():
        choice = chosen(tag, group)
        for run in group:
            own = run.setting
            text = f"{own.backend}, {own.precision}, {own.recompute}, {own.microbatch_rows} rows"
            text = f"**{text}** (chosen)" if is_chosen(run, choice) else text
            share = run.tokens_per_second / group[0].tokens_per_second
            peak = f"{run.peak_gib:.1f}" if "memory" in run.valid else ""
            lines.append(f"| {tag} | {model} | {text} | {run.tokens_per_second:,.0f} | {share:.0%} | {peak} |")
        if not any(is_chosen(run, choice) for run in group):
            lines.append(
                f"| {tag} | {model} | **{choice.say()}** (chosen, not measured) | | | {choice.gib:.1f} predicted |"
            )
    return "\n".join(lines)


def worst(runs: tuple[Measured, ...]) -> float:
    """The largest share by which a prediction of memory is off."""
    return max(
        (abs(predict(r.shape, r.setting).total / GIB / r.peak_gib - 1) for r in runs if "memory" in r.valid),
        default=0.0,
    )


def tables() -> dict[str, str]:
    """The README's tables of the plan, by the name of their place in it."""
    runs = measured()
    of_the_plan = {"predicted": measured_table(runs), "sweep": sweep_table(runs), "clusters": cluster_table()}
    return of_the_plan | gpu.tables()


def put_into(readme: str) -> str:
    """The README with the tables as they are now."""
    for name, table in tables().items():
        head, _, rest = readme.partition(f"<!-- {name}: -->\n")
        readme = f"{head}<!-- {name}: -->\n{table}\n<!-- :{name} -->" + rest.partition(f"<!-- :{name} -->")[2]
    return readme


def main() -> int:
    """Print the tables."""
    if "--readme" in sys.argv:
        README.write_text(put_into(README.read_text()))
    print("\n\n".join(tables().values()) + "\n")
    for run in measured():
        parts = predict(run.shape, run.setting)
        print(f"{run.name} ({parts.moment}): " + ", ".join(f"{name} {gib:.1f}" for name, gib in parts.as_gib().items()))
    return int(worst(measured()) > MOST_OFF)


if __name__ == "__main__":
    sys.exit(main())
