"""What a config refers to, looked up: globs become files with digests, hub ids commits, a folder its digests.

A model is identified by the content of its files, wherever they lie. Digests of files are cached in
`runs/.digests.json` by path, size and time of change, so that a corpus is read for its digest once.
"""

from __future__ import annotations

import glob
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from tasks import hub
from tasks.config import Evaluate, Run, locate, nearest
from tasks.errors import UserError
from tasks.roots import hold_found
from tasks.stage import file_sha256, write_text
from tasks.trust import check_trust

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt",
                   "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")  # fmt: skip
CONFIG_FILES = ("config.json", "generation_config.json")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Digests:
    """SHA-256 of files, remembered between runs."""

    def __init__(self, runs: Path) -> None:
        self.path = runs / ".digests.json"
        self.known: dict[str, list[Any]] = {}
        self.changed = False

    def __enter__(self) -> Digests:
        try:
            self.known = json.loads(self.path.read_text())
        except (FileNotFoundError, ValueError):  # a cache: without it the files are read again
            self.known = {}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.changed:
            with suppress(OSError):  # a plan can be asked for where nothing can be written
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_text(self.path, json.dumps(self.known))

    def of(self, path: Path) -> str:
        """The digest of a file."""
        stat, name = path.stat(), str(path)
        known = self.known.get(name)
        if known is None or known[:2] != [stat.st_size, stat.st_mtime_ns]:
            known = [stat.st_size, stat.st_mtime_ns, file_sha256(path)]
            self.known[name], self.changed = known, True
        return str(known[2])


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
        hold_found([*folder.glob("*"), *folder.rglob("*.py")], config_path, where)
        weights = sorted(folder.glob("*.safetensors"))
        tokenizer = {name: digests.of(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()}
        configs = {name: digests.of(folder / name) for name in CONFIG_FILES if (folder / name).is_file()}
        identity = {**configs, **{file.name: digests.of(file) for file in weights}, **tokenizer}
        if run.model.trust_remote_code:
            code = {str(file.relative_to(folder)): digests.of(file) for file in sorted(folder.rglob("*.py"))}
            identity, tokenizer = identity | code, tokenizer | code
    check_trust(folder, run.model.trust_remote_code, where)
    _check_shards(folder, where)
    vocab_size, max_positions = _sizes(folder / "config.json")
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
            files = [{"path": str(file), "bytes": file.stat().st_size, "sha256": digests.of(file)} for file in found]
            resolved[name] = {"spec": spec, "files": files}
    return resolved


def resolve_task_files(evaluate: Evaluate, config_path: Path, digests: Digests) -> tuple[list[dict[str, str]], bool]:
    """Every file that the run's own lm-eval tasks consist of (YAML, Python beside it, their data), with digests.

    Also whether the config names tasks that are none of them: those are lm-eval's own, and their data is the hub's.
    """
    folder = Path(evaluate.include_path)
    if not folder.is_dir():
        where = locate(config_path, "evaluate", "include_path")
        raise UserError(f"no such folder: {folder}", where=where, allowed="a folder of lm-eval task YAMLs")
    below = sorted(folder.rglob("*"))
    files = [file for file in below if file.suffix in (".yaml", ".yml", ".py")]
    links = [path for path in below if path.is_symlink()]
    hold_found([*files, *links], config_path, locate(config_path, "evaluate", "include_path"))
    wanted = set(evaluate.tasks)
    for file in [f for f in files if f.suffix != ".py"]:
        task = _hold_task(file, config_path)
        if task.get("task") in wanted:
            files += _task_data(task, file)
            wanted.discard(task["task"])
    return [{"path": str(file), "sha256": digests.of(file)} for file in dict.fromkeys(files)], bool(wanted)


def _construct_text(_loader: yaml.SafeLoader, node: yaml.Node) -> str:
    return str(node.value)


class _TaskYaml(yaml.SafeLoader):
    """lm-eval's YAML: `!function module.name` is taken as text here."""


_TaskYaml.add_constructor("!function", _construct_text)


def _hold_task(file: Path, config_path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A task's file, read, once all that it and the files that it includes name is found to lie below the roots."""
    task: dict[str, Any] = yaml.load(file.read_text(), Loader=_TaskYaml) or {}
    included = task.get("include") or []
    others = [file.parent / str(one) for one in (included if isinstance(included, list) else [included])]
    hold_found([*_paths_read(task), *others], config_path, str(file))
    for other in others:
        if other.is_file() and other.resolve() not in above:  # lm-eval refuses a circle
            _hold_task(other.resolve(), config_path, (*above, other.resolve()))
    return task


def _paths_read(task: dict[str, Any]) -> list[str]:
    """Where a task's data may lie; a data set's id or the address of a host, taken as a relative path, passes."""
    texts, left = [], [task.get("dataset_path"), task.get("dataset_kwargs")]
    while left:
        value = left.pop()
        left += value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
        texts += value.split("::") if isinstance(value, str) else []  # zip://NAME::PATH
    return [os.path.expanduser(text.rpartition("://")[2]) for text in texts]  # noqa: PTH111  # file:///PATH, ~/PATH


def _task_data(task: dict[str, Any], file: Path) -> list[Path]:
    named = (task.get("dataset_kwargs") or {}).get("data_files") or {}
    values = named.values() if isinstance(named, dict) else [named]
    paths = [Path(path) for value in values for path in ([value] if isinstance(value, str) else value)]
    for path in paths:
        if not path.is_file():
            raise UserError(f"no such file: {path}", where=f"{file}, key dataset_kwargs.data_files",
                            allowed="paths relative to the project's root")  # fmt: skip
    return paths


def _expand(globs: list[str], where: str, name: str) -> list[Path]:
    files: list[Path] = []
    for pattern in globs:
        found = [Path(path) for path in sorted(glob.glob(pattern, recursive=True)) if Path(path).is_file()]  # noqa: PTH207
        if not found:
            missing = "matches no file" if glob.has_magic(pattern) else "does not exist"
            siblings = [str(path) for path in Path(pattern).parent.glob("*")] if Path(pattern).parent.is_dir() else []
            raise UserError(f"source '{name}': {pattern} {missing}{nearest(pattern, siblings)}", where=where,
                            todo="correct the path; it is relative to the project's root")  # fmt: skip
        files += found
    return list(dict.fromkeys(files))


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


def _check_shards(folder: Path, where: str) -> None:
    """Every shard lies in the model's folder: what an index names elsewhere would be loaded, and digested by nobody."""
    index = folder / "model.safetensors.index.json"
    shards = json.loads(index.read_text())["weight_map"].values() if index.is_file() else []
    if strays := sorted({name for name in shards if Path(name).name != name}):
        raise UserError(f"the model's index names weights outside its folder: {', '.join(strays[:3])}",
                        where=str(index), allowed="file names without a folder", todo=f"correct {where}")  # fmt: skip


def _sizes(config_file: Path) -> tuple[int, int | None]:
    config = json.loads(config_file.read_text())
    config = config.get("text_config", config)
    return int(config["vocab_size"]), config.get("max_position_embeddings")


def _chat_template(run: Run, config_path: Path, digests: Digests) -> dict[str, str] | None:
    if run.model.chat_template is None:
        return None
    path = Path(run.model.chat_template)
    if not path.is_file():
        raise UserError(f"no such file: {path}", where=locate(config_path, "model", "chat_template"),
                        allowed="a Jinja file", todo="configs/chat_template.jinja ships with the project")  # fmt: skip
    return {"path": str(path), "sha256": digests.of(path)}
