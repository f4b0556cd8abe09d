"""Reads what the stages of a run left behind. A run may lack CPT, SFT or evaluation; a missing file is None."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.errors import UserError
from tasks.stage import ARTIFACT, Order, read_artifact, read_order

ROLES = ("base", "cpt", "sft")
TRAIN_STAGES = ("cpt", "sft")


@dataclass(frozen=True)
class StageRecord:
    """One finished stage."""

    name: str
    directory: Path
    order: Order
    artifact: dict[str, Any]

    @property
    def counts(self) -> dict[str, Any]:
        """The counts of the artifact."""
        counts: dict[str, Any] = self.artifact["counts"]
        return counts

    def json(self, name: str) -> Any:
        """A JSON output, or None."""
        path = self.directory / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The records of a JSON lines output; none when there is no such file."""
        return list(self._lines(self.directory / name))

    def _lines(self, path: Path) -> Iterator[dict[str, Any]]:
        if path.is_file():
            with path.open(encoding="utf-8") as file:
                yield from (json.loads(line) for line in file)


@dataclass(frozen=True)
class RunRecord:
    """A run: the order of its report and every stage before it."""

    order: Order
    stages: dict[str, StageRecord]

    @property
    def roles(self) -> list[str]:
        """The models that were evaluated, of base, cpt and sft."""
        return [role for role in ROLES if f"evaluate_{role}" in self.stages]

    @property
    def trained(self) -> list[StageRecord]:
        """The training stages, in order."""
        return [self.stages[name] for name in TRAIN_STAGES if name in self.stages]

    @property
    def prepared(self) -> list[StageRecord]:
        """The preparation of each training stage, in order."""
        return [self.stages[f"prepare_{name}"] for name in TRAIN_STAGES if f"prepare_{name}" in self.stages]

    def evaluation(self, role: str) -> StageRecord:
        """The evaluation of a model."""
        return self.stages[f"evaluate_{role}"]


def gather(directory: Path) -> RunRecord:
    """The run of a report stage's directory."""
    order = read_order(directory)
    stages = {}
    for name, path in order.inputs.items():
        folder = Path(path)
        if not (folder / ARTIFACT).is_file():
            raise UserError(f"the report reads {name}, which is not finished", where=path, todo="run that stage first")
        stages[name] = StageRecord(name, folder, read_order(folder), read_artifact(folder))
    return RunRecord(order, stages)
