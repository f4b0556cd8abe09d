"""Known weaknesses of the pinned dependencies, as pip-audit learns them from the package index.

    python -m tests.audit [constraints.txt]        (make audit)

Exit code 1 for a known weakness. An index that does not answer, or that knows none of the packages, is no good news: then
the last line says NOT AUDITED, and the exit code is 0, so that CI does not hang on a service.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

SECONDS = 300


def main(argv: list[str]) -> int:
    """Ask, and print what came back."""
    file = argv[0] if argv else "constraints.txt"
    command = [sys.executable, "-m", "pip_audit", "--requirement", file, "--disable-pip", "--no-deps",
               "--progress-spinner", "off", "--format", "json"]  # fmt: skip
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        print(f"NOT AUDITED: no answer within {SECONDS} s")
        return 0
    try:
        answer = json.loads(asked.stdout)
    except ValueError:
        print(f"NOT AUDITED: {(asked.stderr.strip().splitlines() or ['no answer'])[-1]}")
        return 0
    lines, code = judge(answer)
    print("\n".join(lines))
    return code


def judge(answer: dict[str, Any]) -> tuple[list[str], int]:
    """What pip-audit's JSON means: the lines to print, and the exit code."""
    audited = [one for one in answer["dependencies"] if "vulns" in one]
    skipped = [one["name"] for one in answer["dependencies"] if "vulns" not in one]
    weak = [(one, weakness) for one in audited for weakness in one["vulns"]]
    lines = [
        f"{one['name']} {one['version']}: {weakness['id']}, mended in {', '.join(weakness['fix_versions']) or 'nothing yet'}"
        for one, weakness in weak
    ]
    lines.append(f"{len(audited)} packages audited, {len(weak)} known weaknesses, {len(skipped)} unknown to the index")
    if skipped:
        lines.append(f"NOT AUDITED: {', '.join(skipped) if audited else 'anything; the index gave no data'}")
    return lines, int(bool(weak))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
