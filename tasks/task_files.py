"""The run's own lm-eval tasks, read without lm-eval: what they name is held below the roots, what runs is digested.

Every YAML file of `include_path` is held, whether the run names it or not. Digests have all of these files, the Python
beside them, and of the tasks that run, also by way of a group or a tag, what they include and the data that they read.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks.config import Evaluate, locate, nearest
from tasks.dataset_card import CARDS, check_card
from tasks.digests import Digests
from tasks.errors import UserError
from tasks.evaluation.environment import lm_eval_tasks, names_in, unknown_to_lm_eval
from tasks.roots import hold_found
from tasks.task_yaml import below, code_named, read_task_yaml, texts

Config = dict[str, Any]
DATA_KEYS = ("dataset_path", "dataset_name", "dataset_kwargs")
PATH_KEYS = ("dataset_path", "dataset_kwargs", "use_prompt")
IGNORED = {"__pycache__", ".ipynb_checkpoints"}  # folders in which lm-eval looks for no task
LOCAL = re.compile(r"^((file|local):(//)?)+")  # as fsspec takes it off: with one colon, and without a slash, too


@dataclass(frozen=True)
class TaskFile:
    """A YAML file as lm-eval takes it: merged with the files that it includes."""

    path: Path
    config: Config
    included: tuple[Path, ...]  # and the Python that it names

    @property
    def name(self) -> Any:
        """What lm-eval knows it by."""
        return self.config.get("group" if self.is_group else "task")

    @property
    def is_group(self) -> bool:
        """Whether it is a group, with its tasks in a list."""
        return "group" in self.config and "class" not in self.config


@dataclass(frozen=True)
class Suite:
    """The tasks, groups and tags of a folder by name; of two equal names the first counts."""

    files: dict[str, TaskFile] = field(default_factory=dict)
    tags: dict[str, list[str]] = field(default_factory=dict)

    def add(self, file: TaskFile) -> None:
        """Take in what a file defines."""
        name, tags = file.name, file.config.get("tag") or []
        if not isinstance(name, str) or name in self.files or name in self.tags:
            return
        self.files[name] = file
        for tag in [] if file.is_group else tags if isinstance(tags, list) else [tags]:
            if isinstance(tag, str) and tag not in self.files:
                self.tags.setdefault(tag, []).append(name)

    def reached(self, name: str, over: Config, above: tuple[str, ...] = ()) -> Iterator[tuple[TaskFile, Config]]:
        """Every task that runs under a name and what is said of its data; every group on the way, without data."""
        for task in sorted(self.tags.get(name, [])):
            yield from self.reached(task, over, above)
        file = self.files.get(name)
        if file is None or name in above:  # lm-eval's own; a group within itself
            return
        if not file.is_group:
            yield file, _data_keys(file.config) | over
            return
        yield file, {}
        yield from self._members(file, file.config, over, (*above, name))

    def _members(
        self, file: TaskFile, group: Config, over: Config, above: tuple[str, ...]
    ) -> Iterator[tuple[TaskFile, Config]]:
        over, members = _data_keys(group) | over, group.get("task")
        for member in members if isinstance(members, list) else []:
            own = member if isinstance(member, dict) else {}
            name = own.get("group", own.get("task")) if own else member
            if not isinstance(name, str):
                raise UserError(
                    f"the group '{group.get('group')}' has the member {member!r}",
                    where=f"{file.path}, key task",
                    allowed="names of tasks and groups, or mappings with `task: NAME` or `group: NAME`",
                )
            if name in self.files or name in self.tags:
                yield from self.reached(name, over | _data_keys(own), above)
            elif "group" in own:
                yield from self._members(file, own, over, above)
            else:
                yield file, over | _data_keys(own)


def resolve_task_files(evaluate: Evaluate, config_path: Path, digests: Digests) -> tuple[list[dict[str, str]], bool]:
    """Every file that the run's own lm-eval tasks consist of (YAML, Python beside it, their data), with digests.

    Also whether the config names what is no task or group of theirs: that is lm-eval's own, and its data is the hub's.
    """
    folder, where = Path(evaluate.include_path), locate(config_path, "evaluate", "include_path")
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}", where=where, allowed="a folder of lm-eval task YAMLs")
    inside = sorted(folder.rglob("*"))
    files = [file for file in inside if file.suffix in (".yaml", ".yml", ".py") and not file.is_dir()]
    hold_found([*files, *(path for path in inside if path.is_symlink())], config_path, where)
    suite = Suite()
    for file in sorted(files, key=Path.as_posix):  # lm-eval's order: of two equal names the first counts
        if file.suffix != ".py":
            one = _read(file, config_path, {file.resolve()})
            if file.suffix == ".yaml" and not IGNORED.intersection(file.parts):
                suite.add(one)
    _refuse_unknown(evaluate, suite, config_path)
    _refuse_brought_twice(evaluate, suite, config_path)
    pairs = [pair for name in evaluate.tasks for pair in suite.reached(name, {})]
    pairs.sort(key=lambda pair: pair[0].path)
    data = [path for file, config in pairs for path in _data(file.path, config, config_path)]
    known = {file.resolve() for file in files}
    included = [path for file, _ in pairs for path in file.included if path.resolve() not in known]
    found = dict.fromkeys([*files, *data, *included])
    on_hub = not set(evaluate.tasks) <= set(suite.files)
    return [{"path": str(file), "sha256": digests.of(file)} for file in found], on_hub


def _read(file: Path, config_path: Path, seen: set[Path]) -> TaskFile:
    """A file and those that it includes, once all that they name is found to lie below the roots."""
    own = read_task_yaml(file)
    include = own.pop("include", None) or []
    # lm-eval follows a link first, so that what it includes lies beside the file and not beside the link.
    beside = file.resolve().parent if file.is_symlink() else file.parent
    others = [beside / str(one) for one in (include if isinstance(include, list) else [include])]
    modules = code_named(own, file)
    hold_found([*_paths_read(own), *others, *modules], config_path, str(file))
    config: Config = {}
    included = list(modules)
    for other in others:
        if other.is_file() and other.resolve() not in seen:  # lm-eval refuses a file that comes twice
            seen.add(other.resolve())
            one = _read(other, config_path, seen)
            config |= one.config
            included += [other, *one.included]
    return TaskFile(file, config | own, tuple(included))


def _refuse_unknown(evaluate: Evaluate, suite: Suite, config_path: Path) -> None:
    """Names that neither the folder nor lm-eval has: else they would be told by the evaluation, behind all training."""
    own = sorted({*suite.files, *suite.tags})
    for name in unknown_to_lm_eval([name for name in evaluate.tasks if name not in own]):
        side = "domain" if name in evaluate.domain else "general"
        folder = lm_eval_tasks()
        like = nearest(name, own) or nearest(name, names_in(folder) if folder else ())
        raise UserError(
            f"unknown evaluation task '{name}'{like}",
            where=locate(config_path, "evaluate", side, getattr(evaluate, side).index(name)),
            allowed=", ".join([*own, "the tasks of lm-eval"]),
            todo=f"correct the name, or add its YAML file to {evaluate.include_path}",
        )


def _refuse_brought_twice(evaluate: Evaluate, suite: Suite, config_path: Path) -> None:
    """What two names bring, as far as the folder tells: a task of lm-eval's own is found when the tasks are loaded."""
    asked: dict[str, str] = {}
    for name in evaluate.tasks:
        for task in [file.name for file, _ in suite.reached(name, {})]:  # or group, whose tasks come with it
            if (other := asked.setdefault(task, name)) != name:
                side = "domain" if name in evaluate.domain else "general"
                where = locate(config_path, "evaluate", side, getattr(evaluate, side).index(name))
                raise brought_twice(task, other, name, where)


def brought_twice(task: str, first: str, second: str, where: str) -> UserError:
    """That two names of the run's file bring the same task."""
    return UserError(
        f"'{first}' and '{second}' both bring the evaluation task '{task}'",
        where=where,
        allowed="each task by one name: its own, or that of a group or tag",
        todo="leave out one of the two",
    )


def _data_keys(config: Config) -> Config:
    return {key: config[key] for key in DATA_KEYS if key in config}


def _paths_read(config: Config) -> list[str]:
    """Where a task's data may lie, or that of a task within it; an id or the address of a host passes as relative."""
    parts = [part for value in below(config, PATH_KEYS) for text in texts(value) for part in text.split("::")]
    return [os.path.expanduser(_local(part).rpartition("://")[2]) for part in parts]  # noqa: PTH111


def _local(text: str) -> str:
    return LOCAL.sub("", text)


def _data(file: Path, config: Config, config_path: Path) -> list[Path]:
    """The local files that a task reads: those that `data_files` names, or all of a folder. A hub's are none."""
    kwargs, folder = config.get("dataset_kwargs") or {}, config.get("dataset_path")
    if not isinstance(kwargs, dict):
        raise UserError(f"dataset_kwargs is {kwargs!r}", where=str(file), allowed="a mapping")
    own = Path(folder) if isinstance(folder, str) and Path(folder).is_dir() else None
    within = kwargs.get("data_dir")
    base = (own or Path()) / Path(_local(within) if isinstance(within, str) else "").expanduser()
    found: list[Path] = []
    for text in texts(kwargs.get("data_files")):
        matching = _matching(base / Path(_local(text.split("::")[-1])).expanduser())  # zip://NAME::PATH
        if not matching and (own or "/" not in str(folder)):  # else the path is one within a dataset of the hub
            raise UserError(f"no such file: {base / text}", where=f"{file}, key dataset_kwargs.data_files",
                            allowed="paths relative to the project's root")  # fmt: skip
        found += matching
    cards = [own / name for name in CARDS if (own / name).is_file()] if own else []
    if not found and (own or within) and base.is_dir():
        found = sorted(path for path in base.rglob("*") if path.is_file())
        hold_found(base.rglob("*"), config_path, str(file))
    if own:
        check_card(own)
        hold_found(own.rglob("*"), config_path, str(file))
    hold_found(found, config_path, str(file))
    return [*found, *cards]


def _matching(path: Path) -> list[Path]:
    found = [path] if path.is_file() else [Path(one) for one in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207
    return [one for one in found if one.is_file()]
