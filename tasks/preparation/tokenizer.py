"""The run's tokenizer: a folder with everything decided, made once, then read by every process.

1. `copy_tokenizer` puts the model's tokenizer into the output folder. A generic `tokenizer.json` is copied as it is,
   with no import of transformers (torch comes with it: 3 to 9 s); any other class goes through `AutoTokenizer`, which
   may build something else than the file says.
2. `settle` chooses the chat template (the order's file, else the tokenizer's own), adds the special tokens that it uses
   and the vocabulary lacks, and checks EOS and vocabulary.

Special tokens of a template: those listed in its first comment (`{#- special_tokens: <a> <b> -#}`), and every
`<|name|>`.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from tasks.errors import UserError
from tasks.progress import say
from tasks.stage import write_json, write_text
from tasks.trust import trusted

GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend", "PreTrainedTokenizer", None)
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
DECLARED_TOKENS = re.compile(r"\{#-?\s*special_tokens:\s*(.*?)\s*-?#\}", re.DOTALL)
COMMENTS = re.compile(r"\{#.*?#\}", re.DOTALL)
PIPE_TOKENS = re.compile(r"<\|[A-Za-z0-9_.:-]+\|>")
# Models pad their embedding to round sizes: up to 1.8 % in the wild (codegen, phi-2), else below 1 %.
MAX_PADDING_SHARE, MIN_PADDING_ROWS = 0.02, 127


@dataclass(frozen=True)
class Settled:
    """What encoding needs to know, beside `tokenizer.json` in `folder`."""

    folder: str
    eos: str
    eos_id: int
    prefix_ids: tuple[int, ...]  # what the tokenizer itself puts before a text (BOS), or nothing
    template: str | None
    template_variables: dict[str, str]  # bos_token, eos_token, ... as templates use them
    added_tokens: tuple[tuple[str, int], ...]


def copy_tokenizer(model: str, folder: Path) -> None:
    """Put the model's tokenizer, as transformers would load it, into `folder`."""
    source = Path(model)
    config = _read_json(source / "tokenizer_config.json")
    if (source / "tokenizer.json").is_file() and config.get("tokenizer_class") in GENERIC_CLASSES:
        folder.mkdir(parents=True)
        for name in FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        return
    say(f"{'prepare':<14}loads the tokenizer of {model}")
    from transformers import AutoTokenizer

    path, _, revision = (model, "", "") if source.is_dir() else model.partition("@")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision or None, trust_remote_code=trusted())
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise UserError(f"no tokenizer can be loaded: {first_line}", where=model,
                        todo="put tokenizer.json and tokenizer_config.json beside the model") from None  # fmt: skip
    if not getattr(tokenizer, "is_fast", False):
        raise UserError("the tokenizer has no fast version", where=model, allowed="one that saves a tokenizer.json")
    tokenizer.save_pretrained(folder)


def settle(folder: Path, what: dict[str, Any], has_chats: bool) -> Settled:
    """Check the tokenizer in `folder`, give it its template and added tokens, save it."""
    backend, config = Tokenizer.from_file(str(folder / "tokenizer.json")), _read_json(folder / "tokenizer_config.json")
    names = _special_names(config, _read_json(folder / "special_tokens_map.json"))
    eos = _check_eos(backend, names)
    _check_sizes(backend, what)
    template = _template(folder, config, what["chat_template"]) if has_chats else None
    added = _add_tokens(backend, template) if template else ()
    if template:
        write_text(folder / "chat_template.jinja", template)
        if config.pop("chat_template", None) is not None:
            write_json(folder / "tokenizer_config.json", config)  # one place only
    if added:
        backend.save(str(folder / "tokenizer.json"))
    eos_id = _id(backend, eos)
    prefix = tuple(token for token in backend.encode("").ids if token != eos_id)
    return Settled(str(folder), eos, eos_id, prefix, template, names, added)


def load_backend(settled: Settled) -> Tokenizer:
    """The settled tokenizer; a length limit or padding that its file may ask for is off."""
    backend = Tokenizer.from_file(f"{settled.folder}/tokenizer.json")
    backend.no_padding()
    backend.no_truncation()
    return backend


def end_of_turn(settled: Settled) -> dict[str, Any] | None:
    """The token that ends an assistant's turn; generation stops there. None for a stage without chats."""
    if settled.template is None:
        return None
    from tasks.preparation.chat import ChatEncoder

    backend = load_backend(settled)
    token = ChatEncoder(settled.template, settled.template_variables, backend, backend).end_of_turn
    return {"token": token, "id": backend.token_to_id(token)}


def _special_names(config: dict[str, Any], special_map: dict[str, Any]) -> dict[str, str]:
    """`eos_token` and so on, as text."""
    names = {}
    for key, value in {**special_map, **config}.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            names[key] = text
    return names


def _check_eos(backend: Tokenizer, names: dict[str, str]) -> str:
    eos = names.get("eos_token")
    if eos is None or backend.token_to_id(eos) is None:
        what = "names no EOS token" if eos is None else f"names the EOS token {eos!r}, which is not in its vocabulary"
        raise UserError(f"the tokenizer {what}", where="tokenizer_config.json, eos_token",
                        todo="set `eos_token` to the token that ends a document")  # fmt: skip
    return eos


def _check_sizes(backend: Tokenizer, what: dict[str, Any]) -> None:
    size, rows = max(backend.get_vocab(with_added_tokens=True).values()) + 1, what["vocab_size"]
    padding = max(MIN_PADDING_ROWS, int(rows * MAX_PADDING_SHARE))
    if not size <= rows <= size + padding:
        raise UserError(f"tokenizer and model differ in vocabulary: {size:,} and {rows:,}", where="config.json",
                        allowed=f"{size:,} to {size + padding:,} (models pad their embedding a little)",
                        todo="use the tokenizer that belongs to the model")  # fmt: skip
    if what.get("max_positions") and what["seq_len"] > what["max_positions"]:
        raise UserError(f"seq_len is {what['seq_len']:,}, the model has {what['max_positions']:,} positions",
                        where="model.seq_len", allowed=f"at most {what['max_positions']:,}")  # fmt: skip


def _template(folder: Path, config: dict[str, Any], given: dict[str, Any] | None) -> str:
    if given:
        try:
            return Path(given["path"]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"the chat template cannot be read: {error}", where="model.chat_template") from None
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    own = config.get("chat_template")
    if isinstance(own, list):  # several named templates
        own = next((entry["template"] for entry in own if entry["name"] == "default"), None)
    if not isinstance(own, str):
        raise UserError(
            "the stage has chats, and the tokenizer has no chat template",
            where="model.chat_template",
            allowed="a Jinja file",
            todo="set `model.chat_template: configs/chat_template.jinja`",
        )
    return own


def _add_tokens(backend: Tokenizer, template: str) -> tuple[tuple[str, int], ...]:
    """Add what the template uses and the vocabulary lacks; returns (token, id)."""
    declared = DECLARED_TOKENS.search(template)
    used = (declared.group(1).split() if declared else []) + PIPE_TOKENS.findall(COMMENTS.sub("", template))
    new = [token for token in dict.fromkeys(used) if backend.token_to_id(token) is None]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in new])
    return tuple((token, _id(backend, token)) for token in new)


def _id(backend: Tokenizer, token: str) -> int:
    number = backend.token_to_id(token)
    assert number is not None, f"{token} was just found or added"
    return number


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value
