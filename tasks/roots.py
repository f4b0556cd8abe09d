"""Where the paths of a run's file may lead: below the project's folder, the file's own, or one that STEEP_ROOTS names.

Whoever may write a run's file could otherwise make a server read, train on and show any file of its machine, or write
anywhere. STEEP_ROOTS stands in the environment of whoever runs the server, which no run's file can change: folders,
with `:` between them. Links are followed before a path is judged, so one inside a root that leads outside is outside.
Hub ids are no paths. `runs` may itself be a link to a larger disk: who can lay links in the project needs no config.

Held are paths that a run's file names, the files that its globs match, those of the model's folder, and the data of
its lm-eval tasks. Not held is what the tasks under `include_path` run: they are code (`!function` runs the Python
beside them), to be written only by who may run code there. `tasks/task_yaml.py` refuses code from elsewhere.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.errors import UserError
from tasks.yaml_file import locate

if TYPE_CHECKING:
    from tasks.config import Run

VARIABLE = "STEEP_ROOTS"
DEFAULT_RUNS = "runs"


def hold_run(run: Run, config: Path) -> None:
    """Raise `UserError` for a path in a run's file that leads out of the roots."""
    for keys, path in _named(run):
        hold([path], _roots(config), lambda keys=keys: locate(config, *keys))  # type: ignore[misc]


def hold_found(paths: Iterable[str | Path], config: Path, where: str) -> None:
    """The same for files that a run's file led to: a glob's, a folder's, or those that another file names."""
    hold(paths, _roots(config), lambda: where)


def hold_config(config: Path) -> None:
    """The same for the file itself, where somebody else than the operator says which it is."""
    hold([config.parent, config], _operators_roots(), lambda: "parameter config")


def hold(paths: Iterable[str | Path], roots: dict[str, str], where: Callable[[], str]) -> None:
    """Raise `UserError` for the first path that lies, its links followed, below none of the roots."""
    for path in paths:
        try:
            real = os.path.realpath(path)
        except ValueError:  # a zero byte, which no path holds
            raise UserError(f"{str(path)!r} is no path", where=where(), todo="correct it") from None
        if not any(real == root or real.startswith(root.rstrip("/") + "/") for root in roots):
            raise _outside(path, real, roots, where())


def _outside(path: str | Path, real: str, roots: dict[str, str], where: str) -> UserError:
    led = "lies" if os.path.normpath(Path.cwd() / path) == real else f"leads to {real},"
    todo, folder = "move it there", _to_allow(real)
    if folder != "/":  # which would allow everything
        wanted = ":".join(filter(None, [os.environ.get(VARIABLE), folder]))
        todo += f", or set {VARIABLE}={wanted} in the environment of the run (of the worker, on a server)"
    return UserError(
        f"{path} {led} outside the folders that a run's file may name",
        where=where,
        allowed="paths below " + ", ".join(f"{root} ({name})" for root, name in roots.items()),
        todo=todo,
    )


def _to_allow(real: str) -> str:
    """The folder that lets a path in: its own, or that of the whole model in the hub's cache, where links share it."""
    parts = Path(real).parts
    for number, part in enumerate(parts[:-1]):
        if part.startswith(("models--", "datasets--")) and parts[number + 1] in ("snapshots", "blobs"):
            return str(Path(*parts[: number + 1]))
    parent = str(Path(real).parent)
    return real if Path(real).is_dir() or parent == "/" else parent


def _roots(config: Path) -> dict[str, str]:
    return {os.path.realpath(config.parent): "the config's folder"} | _operators_roots()


def _operators_roots() -> dict[str, str]:
    """Real paths of the roots that no config moves, with what each is."""
    named = [folder for folder in os.environ.get(VARIABLE, "").split(":") if folder]
    roots = {os.path.realpath(folder): VARIABLE for folder in named}
    runs, project = os.path.realpath(DEFAULT_RUNS), os.path.realpath(Path.cwd())
    if not Path(runs).is_relative_to(project):
        roots[runs] = f"{DEFAULT_RUNS}/"
    return roots | {project: "the project"}


def _named(run: Run) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Every path in a run's file under its keys; of a glob the part before its wildcards."""
    yield ("runs_dir",), run.runs_dir
    if not run.model.hub:
        yield ("model", "path"), run.model.path
    if run.model.chat_template is not None:
        yield ("model", "chat_template"), run.model.chat_template
    for name, source in run.sources.items():
        for number, pattern in enumerate(source.globs):
            item = (number,) if isinstance(source.files, list) else ()
            yield ("sources", name, "files", *item), _before_wildcards(pattern)
    if run.evaluate:
        yield ("evaluate", "include_path"), run.evaluate.include_path


def _before_wildcards(pattern: str) -> str:
    return str(Path(*takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts)))
