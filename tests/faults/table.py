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

from tasks.provenance import git_commit


@dataclass
class Fault:
    """One case: survived when everything after it held."""

    kind: str  # the table's line: SIGKILL of the trainer
    where: str  # the phase
    case: str  # the test
    seed: int
    seconds_lost: float | None = None
    survived: bool = False


@dataclass
class Table:
    """All cases of a session."""

    seed: int
    faults: list[Fault] = field(default_factory=list)

    def tried(self, kind: str, where: str) -> Fault:
        """Note a case that begins."""
        case = os.environ["PYTEST_CURRENT_TEST"].split("::")[-1].split(" ")[0]
        self.faults.append(Fault(kind, where, case, self.seed))
        return self.faults[-1]

    def write(self, path: Path) -> None:
        """As JSON, with the machine and its load; cases of earlier sessions stay until they are run again."""
        earlier = json.loads(path.read_text())["faults"] if path.is_file() else []
        ours = {fault.case for fault in self.faults}
        faults = [fault for fault in earlier if fault["case"] not in ours] + [asdict(fault) for fault in self.faults]
        machine = {"cores": os.cpu_count(), "system": platform.platform(), "load": round(os.getloadavg()[1], 1)}
        said = {"date": time.strftime("%Y-%m-%d"), "commit": git_commit(), "machine": machine, "faults": faults}
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
    print(f"\n{content['date']}, commit {content['commit']}, {content['machine']}")
