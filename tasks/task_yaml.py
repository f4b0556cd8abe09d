"""An lm-eval task's YAML, read without lm-eval and without running what it names.

Such a file is code all the same: its `!function` runs Python beside it. What is refused here keeps it to that: names of
installed modules (`os.system`) and of files elsewhere, which lm-eval would take, and metrics by path.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tasks.errors import UserError

TODO = "correct the file, or move it out of `evaluate.include_path`"
# lm-eval makes a slash of every dot, so that a leading one would begin an absolute path.
FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
PATH = re.compile(r"[/\\]|^[.~]|\.py$")


class Function(str):
    """`!function module.name`, as text."""

    __slots__ = ()


class _TaskYaml(yaml.SafeLoader):
    """lm-eval's YAML, with functions as text."""


def _construct_function(_loader: yaml.SafeLoader, node: yaml.Node) -> Function:
    return Function(node.value)


_TaskYaml.add_constructor("!function", _construct_function)


def read_task_yaml(file: Path) -> dict[str, Any]:
    """The file's mapping; empty for an empty file. Raises `UserError`."""
    try:
        found = yaml.load(file.read_text(encoding="utf-8"), Loader=_TaskYaml) or {}
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"not readable as YAML: {error.problem}", where=f"{file}{line}", todo=TODO) from None
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        raise UserError(f"not readable as YAML: {error}", where=str(file), todo=TODO) from None
    if not isinstance(found, dict):
        raise UserError(f"the file holds a {type(found).__name__}, no `key: value` mapping", where=str(file),
                        allowed="an lm-eval task or group", todo=TODO)  # fmt: skip
    return found


def code_named(config: dict[str, Any], file: Path) -> list[Path]:
    """The Python files beside a task's file that it names. Raises `UserError` for code from anywhere else."""
    modules = []
    for one in nodes(config):
        if isinstance(one, Function):
            module = file.resolve().parent / f"{one.rpartition('.')[0].replace('.', '/')}.py"
            if not FUNCTION.fullmatch(one) or not module.is_file():
                raise UserError(f"!function {one} names no Python file beside the task's", where=str(file), todo=TODO,
                                allowed="!function FILE.NAME, with FILE.py in the same folder")  # fmt: skip
            modules.append(module)
    for name in below(config, ("metric",)):
        if isinstance(name, str) and not isinstance(name, Function) and PATH.search(name):
            raise UserError(f"the metric {name} is a path, and would be loaded as code", where=str(file), todo=TODO,
                            allowed="the name of one of lm-eval's metrics, or !function FILE.NAME")  # fmt: skip
    return modules


def nodes(value: Any) -> Iterator[Any]:
    """A value and all within it, in order; each list and mapping once, for YAML can put one into itself."""
    left, seen = [value], set()
    while left:
        one = left.pop()
        yield one
        if isinstance(one, dict | list) and id(one) not in seen:
            seen.add(id(one))
            left += reversed(list(one.values() if isinstance(one, dict) else one))


def texts(value: Any) -> list[str]:
    """Every text in a value."""
    return [one for one in nodes(value) if isinstance(one, str)]


def below(value: Any, keys: tuple[str, ...]) -> Iterator[Any]:
    """The values of these keys, however deep they stand."""
    for one in nodes(value):
        if isinstance(one, dict):
            yield from (one[key] for key in keys if key in one)
