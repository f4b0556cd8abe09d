"""What a config refers to, looked up: globs become files with digests, hub ids commits, a folder its digests.

A model is identified by the content of its files, wherever they lie. The run's lm-eval tasks: `tasks/task_files.py`.
"""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks import hub
from tasks.config import Run, locate, nearest
from tasks.digests import Digests
from tasks.errors import UserError
from tasks.layers import check_layers
from tasks.model_files import AGAIN, read_index, read_model_json, read_tensors
from tasks.preparation.readers import file_format
from tasks.roots import hold_found
from tasks.trust import check_trust

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt",
                   "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")  # fmt: skip
VOCABULARIES = ("tokenizer.json", "tokenizer.*.json", "*.model", "vocab.*", "*.tiktoken")  # one of them, at least
CONFIG_FILES = ("config.json", "generation_config.json")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")

NAMED_FILES = 10  # in one error


@dataclass(frozen=True)
class BaseModelFiles:
    """The base model as the stages need it: where it is, what it is, and what its config says."""

    path: str
    identity: dict[str, Any]
    tokenizer: dict[str, Any]
    chat_template: dict[str, str] | None
    vocab_size: int
    max_positions: int | None
    how: dict[str, bool]  # of every stage that loads it: whether its own code may run


def resolve_base_model(run: Run, config_path: Path, digests: Digests) -> BaseModelFiles:
    """Look at the base model's folder (or the hub's file list). Raises `UserError` for what could not be trained."""
    where = locate(config_path, "model", "path")
    if run.model.hub:
        commit = hub.resolve_commit(run.model.path, run.model.revision, "model", where)
        folder = hub.fetch_model_description(run.model.path, commit, where, code=run.model.trust_remote_code is True)
        identity: dict[str, Any] = {"hub": run.model.path, "commit": commit}
        tokenizer = identity
    else:
        folder = Path(run.model.path)
        _check_folder(folder, where)
        hold_found(folder.rglob("*"), config_path, where)
        _check_weights(folder, where)
        _check_tokenizer(folder, where)
        weights = sorted(folder.glob("*.safetensors"))
        tokenizer = {name: digests.of(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()}
        configs = {name: digests.of(folder / name) for name in CONFIG_FILES if (folder / name).is_file()}
        tokenizer |= {name: digests.of(folder / name) for name in _further_files(folder, where)}
        identity = {**configs, **{file.name: digests.of(file) for file in weights}, **tokenizer}
        if run.model.trust_remote_code:
            code = {str(file.relative_to(folder)): digests.of(file) for file in sorted(folder.rglob("*.py"))}
            identity, tokenizer = identity | code, tokenizer | code
    check_trust(folder, run.model.trust_remote_code, where)
    _shards(folder, where)
    _check_adapter(folder, where)
    check_layers(read_model_json(folder / "config.json", where), where)
    vocab_size, max_positions = _sizes(folder / "config.json", where)
    if max_positions and run.model.seq_len > max_positions:
        raise UserError(
            f"model.seq_len is {run.model.seq_len}, beyond the model's {max_positions} positions",
            where=locate(config_path, "model", "seq_len"),
            allowed=f"2 to {max_positions} (max_position_embeddings of {folder / 'config.json'})",
            todo="lower model.seq_len, or choose a base with a longer context",
        )
    template = _chat_template(run, config_path, digests)
    how = {"trust_remote_code": True} if run.model.trust_remote_code else {}
    return BaseModelFiles(str(folder), identity, tokenizer, template, vocab_size, max_positions, how)


def resolve_sources(run: Run, config_path: Path, names: list[str], digests: Digests) -> dict[str, Any]:
    """Each source as it enters an order: its fields, and its files with digests or its dataset's commit."""
    resolved: dict[str, Any] = {}
    for name in names:
        source = run.sources[name]
        spec = source.model_dump(exclude_none=True)
        if source.hf:
            where = locate(config_path, "sources", name, "hf")
            commit = hub.resolve_commit(source.hf.id, source.hf.revision, "dataset", where)
            resolved[name] = {"spec": spec, "hf": source.hf.model_dump() | {"revision": commit}}
        else:
            where = locate(config_path, "sources", name, "files")
            found = _expand(source.globs, where, name)
            hold_found(found, config_path, where)
            _check_formats(found, where, name, is_chat=source.kind != "text")
            files = [{"path": str(file), "bytes": file.stat().st_size, "sha256": digests.of(file)} for file in found]
            resolved[name] = {"spec": spec, "files": files}
    return resolved


def _expand(globs: list[str], where: str, name: str) -> list[Path]:
    files: list[Path] = []
    for pattern in globs:
        found = [Path(path) for path in sorted(glob.glob(pattern, recursive=True)) if Path(path).is_file()]  # noqa: PTH207
        if Path(pattern).is_dir():
            raise UserError(f"source '{name}': {pattern} is a folder", where=where, allowed="files, or globs of files",
                            todo=f"write {pattern.rstrip('/')}/**/* for all that it holds")  # fmt: skip
        if not found:
            missing = "matches no file" if glob.has_magic(pattern) else "does not exist"
            siblings = [str(path) for path in Path(pattern).parent.glob("*")] if Path(pattern).parent.is_dir() else []
            raise UserError(f"source '{name}': {pattern} {missing}{nearest(pattern, siblings)}", where=where,
                            todo="correct the path; it is relative to the project's root")  # fmt: skip
        files += found
    return list(dict.fromkeys(files))


def _check_formats(files: list[Path], where: str, name: str, is_chat: bool) -> None:
    """Every file is one that we read, or all that are not are named at once: a glob of a folder may bring many."""
    refused: dict[str, UserError] = {}
    for file in files:
        try:
            file_format(str(file), is_chat)
        except UserError as error:
            refused[str(file)] = error
    if refused:
        more = f" and {len(refused) - NAMED_FILES} more" if len(refused) > NAMED_FILES else ""
        files_are = "file is" if len(refused) == 1 else "files are"
        raise UserError(
            f"source '{name}': {len(refused)} of {len(files)} {files_are} none that it can hold: "
            f"{', '.join(list(refused)[:NAMED_FILES])}{more}",
            where=where,
            allowed=next(iter(refused.values())).allowed,
            todo="narrow the glob (corpus/**/*.md), or convert the files",
        )


def _check_folder(folder: Path, where: str) -> None:
    if not (folder / "config.json").is_file():
        missing = "holds no config.json" if folder.is_dir() else "is no folder"
        raise UserError(f"the model {folder} {missing}", where=where, allowed="a folder with config.json, "
                        "*.safetensors and a tokenizer", todo="a hub id needs `hub: true` beside it")  # fmt: skip
    if not any(folder.glob("*.safetensors")):
        pickled = [file.name for pattern in PICKLED for file in folder.glob(pattern)]
        found = (
            f"only pickled weights ({', '.join(pickled)}), which can run code when read" if pickled else "no weights"
        )
        raise UserError(f"the model {folder} holds {found}", where=where, allowed="*.safetensors",
                        todo="convert it with save_pretrained, in a place where you trust the file")  # fmt: skip


def _check_weights(folder: Path, where: str) -> None:
    """Every file that would be loaded is there, and whole as far as its header tells: not first in the training."""
    single = "model.safetensors"
    shards = {single} if (folder / single).is_file() else _shards(folder, where) or {single}
    if missing := sorted(name for name in shards if not (folder / name).is_file()):
        raise UserError(f"the model {folder} lacks {', '.join(missing[:3])}", where=where,
                        allowed=f"{single}, or every file that its index names", todo=AGAIN)  # fmt: skip
    for file in folder.glob("*.safetensors"):
        read_tensors(file, where)


def _shards(folder: Path, where: str) -> set[str]:
    """The files that the index names, in the model's folder: one elsewhere would be loaded, and digested by nobody."""
    shards = set(read_index(folder, where).values())
    if strays := sorted(name for name in shards if Path(name).name != name):
        raise UserError(f"the model's index names weights outside its folder: {', '.join(strays[:3])}",
                        where=str(folder / "model.safetensors.index.json"), allowed="file names without a folder",
                        todo=f"correct {where}")  # fmt: skip
    return shards


def _check_tokenizer(folder: Path, where: str) -> None:
    if not any(found for pattern in VOCABULARIES for found in folder.glob(pattern)):
        raise UserError(f"the model {folder} holds no tokenizer", where=where, allowed="tokenizer.json, as "
                        "save_pretrained writes it", todo="copy its tokenizer there")  # fmt: skip


def _check_adapter(folder: Path, where: str) -> None:
    """No adapter: transformers would load the model that it names, from wherever that is, in place of this one."""
    adapter = folder / "adapter_config.json"
    base = read_model_json(adapter, where).get("base_model_name_or_path") if adapter.is_file() else None
    if base:
        raise UserError(f"the model {folder} is an adapter of {base}, which would be loaded in its place", where=where,
                        allowed="a model with all of its weights",
                        todo=f"merge the adapter, or remove {adapter}")  # fmt: skip


def _further_files(folder: Path, where: str) -> list[str]:
    """What few tokenizers have: files for versions of transformers, and chat templates by name."""
    config = folder / "tokenizer_config.json"
    named = (read_model_json(config, where).get("fast_tokenizer_files") or []) if config.is_file() else []
    if strays := [name for name in named if not isinstance(name, str) or Path(name).name != name]:
        raise UserError(f"the tokenizer names files outside its folder: {', '.join(map(str, strays[:3]))}",
                        where=f"{config}, key fast_tokenizer_files", allowed="file names without a folder",
                        todo="correct the list, or remove it: tokenizer.json is read then")  # fmt: skip
    templates = sorted(folder.glob("additional_chat_templates/*.jinja"))
    return [name for name in named if (folder / name).is_file()] + [str(one.relative_to(folder)) for one in templates]


def _sizes(config_file: Path, where: str) -> tuple[int, int | None]:
    config = read_model_json(config_file, where)
    config = config.get("text_config") or config
    vocab_size, max_positions = config.get("vocab_size"), config.get("max_position_embeddings")
    if not isinstance(vocab_size, int) or not isinstance(max_positions, int | None):
        raise UserError(f"{config_file} gives vocab_size {vocab_size!r}, max_position_embeddings {max_positions!r}",
                        where=where, allowed="whole numbers; the second may be left out", todo=AGAIN)  # fmt: skip
    return vocab_size, max_positions


def _chat_template(run: Run, config_path: Path, digests: Digests) -> dict[str, str] | None:
    if run.model.chat_template is None:
        return None
    path = Path(run.model.chat_template)
    if not path.is_file():
        raise UserError(f"no such file: {path}", where=locate(config_path, "model", "chat_template"),
                        allowed="a Jinja file", todo="configs/chat_template.jinja ships with the project")  # fmt: skip
    return {"path": str(path), "sha256": digests.of(path)}
