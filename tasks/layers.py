"""Which layers a model has, as its `config.json` says, and whether the documents of a packed row stay apart in them.

Attention is kept within a document, by its mask or by bounds. The state of a recurrent layer and the reach of a
convolution run on across the border, from row to row of a micro-batch too: what a document is trained on would then
depend on its neighbours, and the result on `microbatch_rows`. Loads neither torch nor transformers.
"""

from __future__ import annotations

from typing import Any

from tasks.errors import UserError

# Not chunked attention (Llama 4): transformers counts its chunks from where the micro-batch begins, not the document.
ATTENTION = {"full_attention", "sliding_attention", "attention"}
ONE_TOKEN = {"mlp", "moe"}  # nothing passes from token to token
LISTS = ("layer_types", "layers_block_type", "block_types")  # one entry a layer
# Without such a list the type of the model tells. A test holds it against transformers.
CROSS_BORDERS = {
    "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear", "lfm2", "lfm2_moe", "mamba",
    "mamba2", "minimax", "nemotron_h", "olmo_hybrid", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text",
    "qwen3_next", "qwen4_exp", "qwen4_exp_text", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2", "zaya",
    "deepseek_v4",  # compresses its keys over several tokens
    "biogpt", "falcon",  # full attention, in classes of transformers whose mask knows no documents
}  # fmt: skip


def check_layers(config: dict[str, Any], where: str) -> None:
    """Raise `UserError` for a model in whose layers documents of a row would see each other."""
    config = config.get("text_config") or config
    lists = [config[name] for name in LISTS if isinstance(config.get(name), list)]
    said = [kind for kinds in lists for kind in kinds]
    crossing = sorted({str(kind) for kind in said} - ATTENTION - ONE_TOKEN)
    if crossing:
        raise _sees_others(f"the model has layers of {', '.join(crossing)}", where)
    if not said and config.get("model_type") in CROSS_BORDERS:
        raise _sees_others(f"the model is a {config['model_type']}", where)


def _sees_others(what: str, where: str) -> UserError:
    return UserError(
        f"{what}, in which the documents of a packed row would see each other, or be cut: a state, a "
        "convolution or a mask does not keep to their borders",
        where=where,
        allowed="models of full or sliding attention only, as Llama, Qwen3, Mistral and Gemma are",
        todo="take such a base",
    )
