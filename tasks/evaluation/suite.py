"""Names of tasks -> lm-eval's task objects. Every mistake in a task's file or data becomes a `UserError`.

Task files of `include_path` are indexed alone first: indexing lm-eval's own thousands of tasks costs 10 s more and is
only done when a name is not found in `include_path`.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import lm_eval.utils
import yaml
from huggingface_hub.constants import is_offline_mode
from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from tasks.config import nearest
from tasks.errors import UserError
from tasks.evaluation.environment import names_in, unknown_to_lm_eval
from tasks.hub import explain, passes, patiently
from tasks.task_files import brought_twice

LM_EVAL_TASKS = Path(lm_eval.tasks.__file__).parent
Loaded = dict[str, list[Task | Group]]
# As lm-eval's own, whose templates can run any Python: they come with data sets and tasks of others.
SANDBOX = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
SANDBOX.filters.update(lm_eval.utils.env.filters)
lm_eval.utils.env = SANDBOX


def load_suite(names: list[str], folder: Path) -> tuple[TaskManager, Loaded]:
    """lm-eval's objects of every name, checked: they have data, run no code of a model's, and come by one name."""
    manager = find_tasks(names, folder)
    loaded = {name: _load(manager, name) for name in names}
    brought_by(loaded)
    return manager, loaded


def find_tasks(names: list[str], folder: Path) -> TaskManager:
    """A manager that knows every name. Raises `UserError` with the nearest known task, or the file that is broken."""
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}", where="evaluate.include_path", todo="correct the path")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    missing = [name for name in names if name not in manager.task_index]
    if not missing:
        return manager
    _refuse_broken_files(folder)
    own = sorted(manager.task_index)
    for name in unknown_to_lm_eval(missing):
        raise _unknown(name, own, folder)
    manager = TaskManager(include_path=str(folder), include_defaults=True)
    for name in missing:
        if name not in manager.task_index:
            raise _unknown(name, own, folder)
    return manager


def leaves(loaded: list[Task | Group]) -> list[Task]:
    """The tasks of a name; one, unless the name is a group or a tag."""
    return [task for item in loaded for task in (item.get_all_tasks() if isinstance(item, Group) else [item])]


def brought_by(loaded: Loaded) -> dict[str, str]:
    """Every task and group that lm-eval gives results for, and the name in the run's file that brought it.

    Raises `UserError` for a task that two names bring: lm-eval gives it one result, which has one side.
    """
    asked: dict[str, str] = {}
    for name, items in loaded.items():
        for task in leaves(items):
            if (other := asked.setdefault(task.task_name, name)) != name:
                raise brought_twice(task.task_name, other, name, "evaluate")
        for group in (item for item in items if isinstance(item, Group)):
            asked |= {one.name: name for one in (group, *group.get_all_groups())}  # each may have an aggregate
    return asked


def _unknown(name: str, own: list[str], folder: Path) -> UserError:
    return UserError(
        f"unknown evaluation task '{name}'{nearest(name, own) or nearest(name, names_in(LM_EVAL_TASKS))}",
        where=str(folder),
        allowed=", ".join([*own, "the tasks of lm-eval"]),
        todo="correct the name in `evaluate:`, or add its YAML file to the folder",
    )


def _refuse_broken_files(folder: Path) -> None:
    """lm-eval skips a file that it cannot read in silence; the name asked for may stand in it."""
    for path in sorted(folder.rglob("*.yaml")):
        try:
            load_yaml(path, resolve_func=False)
        except yaml.MarkedYAMLError as error:
            line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
            raise UserError(f"not readable as YAML: {error.problem}", where=f"{path}{line}") from None
        except Exception as error:  # a missing include, no mapping, a wrong encoding
            raise UserError(f"not readable as a task: {error}", where=str(path)) from None


def _load(manager: TaskManager, name: str) -> list[Task | Group]:
    entry = manager.task_index[name]
    where = str(entry.yaml_path or name)
    try:
        # `load` would flatten a tag and hide which name brought which task
        ask = lambda: manager._load_spec(name)  # noqa: E731
        loaded = ask() if _offline() else patiently(ask)
        items: list[Any] = loaded if isinstance(loaded, list) else [loaded]
        counts = {task.task_name: len(task.eval_docs) for task in leaves(items)}
        if LM_EVAL_TASKS not in Path(where).parents:
            for task in leaves(items):
                _check_targets(task, where)
    except UserError:
        raise
    except Exception as error:  # lm-eval and datasets raise anything from KeyError to their own; all of it is input
        traceback.print_exc(file=sys.stdout)
        raise _explain(name, where, entry.cfg or {}, error) from None
    for task, count in counts.items():
        if not count:
            raise UserError(f"the evaluation task '{task}' has no documents", where=where, todo="check its data file")
    if unsafe := [task.task_name for task in leaves(items) if getattr(task, "UNSAFE_CODE", False)]:
        raise UserError(f"the evaluation task '{unsafe[0]}' runs code that a model writes", where=where,
                        todo="leave it out: it is never run here")  # fmt: skip
    return items


def _check_targets(task: Task, where: str) -> None:
    """Every record's right answer is one of its choices: with any other, lm-eval scores 0 and goes on."""
    if not isinstance(task, ConfigurableTask) or task.OUTPUT_TYPE != "multiple_choice":
        return
    if task.config.doc_to_choice is None or task.config.process_results is not None:  # the task scores by itself
        return
    for number, doc in enumerate(task.eval_docs, start=1):
        choices = task.doc_to_choice(doc)
        said: Any = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        for target in said if isinstance(said, list) else [said]:
            if not (0 <= target < len(choices) if isinstance(target, int) else target in choices):
                raise UserError(
                    f"'{task.task_name}', record {number}: the target {target!r} is none of its choices",
                    where=f"{where}, key doc_to_target",
                    allowed=f"0 to {len(choices) - 1}, or one of {choices}",
                    todo=f"correct the key, or the record; its fields are {', '.join(doc)}",
                )


def _explain(name: str, where: str, config: dict[str, Any], error: Exception) -> UserError:
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    if missing := [f for f in _flat(files) if not any(c in f for c in "*?[") and not Path(f).is_file()]:
        return UserError(f"the data file of the evaluation task '{name}' is missing: {missing[0]}", where=where,
                         todo="correct `data_files` (relative to the project), or make the file")  # fmt: skip
    if _offline() and isinstance(error, ConnectionError):
        return UserError(
            f"the evaluation task '{name}' needs data of the hub, and this run is offline", where=where,
            todo="use local data: what names only tasks of include_path runs offline, as all does under HF_HUB_OFFLINE",
        )  # fmt: skip
    if passes(error) and not _offline():
        return UserError(f"the data of the evaluation task '{name}' did not come: {explain(error)}", where=where,
                         todo="check that the hub can be reached, and run the same command again")  # fmt: skip
    return UserError(f"the evaluation task '{name}' does not load: {type(error).__name__}: {explain(error)}",
                     where=where, todo="the log holds the whole traceback")  # fmt: skip


def _offline() -> bool:
    """Whether this process was told to ask no hub; HF_DATASETS_OFFLINE alone tells `datasets`."""
    return is_offline_mode() or bool(datasets.config.HF_HUB_OFFLINE)


def _flat(value: Any) -> list[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [file for item in value for file in _flat(item)]
    return [value] if isinstance(value, str) else []
