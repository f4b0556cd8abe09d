"""The table of faults for the README: `python -m tests.faults.table FILE` prints what `make test-faults` wrote.

A line a kind of fault: how often it was tried and survived, and the seconds that it cost beyond an undisturbed run (start-up of
the second try included).
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass
class Fault:
    """One case: survived when everything after it held."""

    kind: str  # the table's line: SIGKILL of the trainer
    where: str  # the phase
    seconds_lost: float | None = None
    survived: bool = False


@dataclass
class Table:
    """All cases of a session."""

    seed: int
    faults: list[Fault] = field(default_factory=list)

    def tried(self, kind: str, where: str) -> Fault:
        """Note a case that begins."""
        self.faults.append(Fault(kind, where))
        return self.faults[-1]

    def write(self, path: Path) -> None:
        """As JSON, with the machine."""
        machine = {"cores": os.cpu_count(), "system": platform.platform(), "load": os.getloadavg()[1]}
        said = {"seed": self.seed, "date": time.strftime("%Y-%m-%d"), "machine": machine,
                "faults": [asdict(fault) for fault in self.faults]}  # fmt: skip
        path.write_text(json.dumps(said, indent=1) + "\n")


def render(said: dict) -> str:  # type: ignore[type-arg]
    """The table in Markdown."""
    lines = ["| fault | at | tried | survived | seconds lost, median (most) |", "|---|---|---|---|---|"]
    kinds: dict[str, list[dict]] = {}  # type: ignore[type-arg]
    for fault in said["faults"]:
        kinds.setdefault(fault["kind"], []).append(fault)
    for kind, faults in kinds.items():
        lost = [fault["seconds_lost"] for fault in faults if fault["seconds_lost"] is not None]
        seconds = f"{statistics.median(lost):.0f} ({max(lost):.0f})" if lost else ""
        where = ", ".join(dict.fromkeys(fault["where"] for fault in faults))
        survived = sum(fault["survived"] for fault in faults)
        lines.append(f"| {kind} | {where} | {len(faults)} | {survived} | {seconds} |")
    survived = sum(fault["survived"] for fault in said["faults"])
    lines.append(f"| all | | {len(said['faults'])} | {survived} | |")
    return "\n".join(lines)


if __name__ == "__main__":
    content = json.loads(Path(sys.argv[1]).read_text())
    print(render(content))
    print(f"\nseed {content['seed']}, {content['date']}, {content['machine']}")
