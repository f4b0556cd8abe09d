"""Our YAML files, read and checked: an error names file, line, key, value and what is allowed.

PyYAML's nodes know their lines and pydantic's errors know their keys; `validate` brings both together.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from tasks.allowed import allowed_words, meant, shown
from tasks.errors import UserError

SectionT = TypeVar("SectionT", bound=BaseModel)
# libyaml, where PyYAML was built with it, is ten times faster.
SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

MAX_VALUES = 100_000  # in one file
MAX_DEPTH = 50  # lists and mappings within each other; libyaml's composer ends the process at some ten thousand


class Misplaced(ValueError):
    """A value that contradicts another one; says at which key below its section."""

    def __init__(self, text: str, *location: str) -> None:
        super().__init__(text)
        self.location = location


class Section(BaseModel):
    """Base of every section: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def locate(path: Path, *keys: str | int) -> str:
    """`FILE:LINE, key a.b` for an error about a value that was valid on paper."""
    return f"{_at(path, _find(read_yaml(path), keys))}, key {'.'.join(map(str, keys))}"


def nearest(word: str, known: Iterable[str]) -> str:
    """`, did you mean 'x'?` for the nearest known word, or nothing."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean '{found[0]}'?" if found else ""


def read_yaml(path: Path) -> yaml.MappingNode:
    """The file as PyYAML's nodes: a finite mapping without a key that stands twice. Raises `UserError`."""
    try:
        text = path.read_text(encoding="utf-8")
        _check_depth(text, path)
        root = yaml.compose(text, Loader=SafeLoader)
    except FileNotFoundError:
        known = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise UserError(f"no such file: {path}{nearest(str(path), known)}", allowed=", ".join(known)) from None
    except OSError as error:  # a folder, or a file that we may not read
        raise UserError(f"{path} cannot be read: {error.strerror}", allowed="a YAML file") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line if error.problem_mark else 0
        tab = "\t" in ([*text.splitlines(), ""][line] if error.problem_mark else "")
        raise UserError(f"not readable as YAML: {error.problem}", where=f"{path}:{line + 1}",
                        todo="indent with spaces: the line holds a tab" if tab else "") from None  # fmt: skip
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"the file is not UTF-8 (byte {error.object[error.start]:#x})",
            where=f"{path}:{line}",
            todo="save it as UTF-8",
        ) from None
    except yaml.YAMLError as error:
        raise UserError(f"not readable as YAML: {error}", where=str(path)) from None
    if not isinstance(root, yaml.MappingNode):
        raise UserError("the file holds no `key: value` mapping", where=str(path))
    _check_node(root, path, {})
    return root


def _check_depth(text: str, path: Path) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise UserError(f"more than {MAX_DEPTH} lists or mappings stand within each other",
                            where=_at(path, event))  # fmt: skip


def _check_node(node: yaml.Node, path: Path, sizes: dict[int, int]) -> int:
    """The number of values in a node as its aliases repeat them. Refuses a key that stands twice, a node that contains
    itself, and more values than a file could spell out: nine lines of ten aliases each stand for a thousand million.

    `sizes` holds those of the nodes seen, 0 for one that is not through: each is looked at once.
    """
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise UserError("the value contains itself", where=_at(path, node), todo="write it out, without the alias")
        return sizes[id(node)]
    sizes[id(node)], size = 0, 1
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise UserError("a key is a list or a mapping", where=_at(path, key), allowed="a word")
            if key.value in seen:  # YAML would keep the last one in silence
                raise UserError(f"the key '{key.value}' stands twice", where=_at(path, key))
            seen.add(key.value)
            size += _check_node(value, path, sizes)
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_check_node(value, path, sizes) for value in node.value)
    if size > MAX_VALUES:
        raise UserError(f"with its aliases written out it holds more than {MAX_VALUES:,} values", where=_at(path, node),
                        todo="write out what you mean, without aliases")  # fmt: skip
    sizes[id(node)] = size
    return size


def validate(schema: type[SectionT], node: yaml.Node, path: Path, prefix: tuple[str, ...] = ()) -> SectionT:
    """The node as a section. Raises `UserError` with file, line, key, value and what is allowed."""
    constructor = yaml.SafeLoader("")
    try:
        return schema.model_validate(constructor.construct_document(node))
    except ValidationError as error:
        errors = [dict(one) | {"loc": _location(node, dict(one)), "raw": one["loc"]} for one in error.errors()]
        # A misspelt key also makes a required one go missing: name the misspelling first.
        first = min(errors, key=lambda e: e["type"] != "extra_forbidden")
        others = len({one["loc"] for one in errors}) - 1
        raise _explain(schema, node, path, prefix, first, others) from None


def _location(root: yaml.Node, error: dict[str, Any]) -> tuple[Any, ...]:
    """Where the value stands in the file: pydantic also names the type that it tried, and what is not there."""
    held: list[str | int] = []
    for part in error["loc"]:
        if not _holds(_find(root, tuple(held)), part):
            break
        held.append(part)
    if error["type"] == "missing" and isinstance(error["loc"][-1], str):
        held.append(error["loc"][-1])
    return *held, *getattr(error.get("ctx", {}).get("error"), "location", ())


def _holds(node: yaml.Node, part: str | int) -> bool:
    if isinstance(node, yaml.MappingNode):
        return part in [key.value for key, _ in node.value]
    return isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value)


def _explain(
    schema: type[BaseModel], root: yaml.Node, path: Path, prefix: tuple[str, ...], error: dict[str, Any], others: int
) -> UserError:
    location = error["loc"]
    node, known = _find(root, location), _known_keys(schema, location[:-1])
    key = ".".join(map(str, (*prefix, *location))) or "(the whole file)"
    more = f" ({others} more after this one)" if others else ""
    where = f"{_at(path, node)}, key {key}{more}"
    if error["type"] == "extra_forbidden":
        return UserError(f"unknown key '{location[-1]}'{nearest(str(location[-1]), known)}", where=where,
                         allowed=", ".join(known), todo="correct or remove the key")  # fmt: skip
    last = location[-1] if location else key
    if error["type"] == "missing" and last == error["raw"][-1]:
        return UserError(f"the key '{last}' is missing", where=where, todo=f"add `{last}:`")
    if error["type"] == "value_error":  # one of our own checks: it says everything
        return UserError(str(error["msg"]).removeprefix("Value error, "), where=where)
    what = f"'{last}' is no name" if error["raw"][-1:] == ("[key]",) else f"{last} is {shown(error['input'])}"
    return UserError(what, where=where, allowed=allowed_words(error), todo=meant(error))


def _find(node: yaml.Node, location: tuple[Any, ...]) -> yaml.Node:
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == str(part)]
            if not found:
                break
            node = found[0][1] if isinstance(found[0][1], yaml.CollectionNode) else found[0][0]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
    return node


def _known_keys(schema: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """The keys that the section at `location` may hold."""
    current: Any = schema
    for part in location:
        field = current.model_fields.get(str(part)) if _is_section(current) else None
        if field is not None:
            found = [arg for arg in _walk_types(field.annotation) if _is_section(arg)]
            current = found[0] if found else current
    return list(current.model_fields)


def _walk_types(annotation: Any) -> list[Any]:
    return [annotation, *(t for arg in getattr(annotation, "__args__", ()) for t in _walk_types(arg))]


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _at(path: Path, node: yaml.Node | yaml.Event) -> str:
    return f"{path}:{node.start_mark.line + 1}" if node.start_mark else str(path)
