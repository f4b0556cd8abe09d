"""Write the report of a run: `python -m tasks.reporting runs/report-KEY`.

Exit codes: 0 done (or was done before), 2 a mistake in the input, told in DIR/error.txt.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tasks.disk import writes_told
from tasks.errors import EXIT_USER_ERROR, UserError
from tasks.progress import say
from tasks.reporting.gate import read_verdict, say_verdict
from tasks.stage import is_done, leave_error, read_order, stage_lock


def main(directory: Path) -> int:
    """Write the report unless it stands; holds the stage's lock meanwhile."""
    try:
        order = read_order(directory)
        with (
            writes_told(directory),
            stage_lock(directory, on_wait=lambda holder: say(f"{order.stage:<14}waiting for {holder}")),
        ):
            if is_done(directory):
                return 0
            say(f"{order.stage:<14}drawing the tables and plots of {len(order.inputs)} stages")
            from tasks.reporting.write import write_report  # 1 s of pandas and matplotlib

            artifact = write_report(directory)
    except UserError as error:
        leave_error(directory, error)
        return EXIT_USER_ERROR
    if verdict := read_verdict(directory):
        say(f"{order.stage:<14}{say_verdict(verdict)}")
    say(f"{order.stage:<14}done: {directory / 'report.html'}, {artifact['seconds']:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])) if len(sys.argv) == 2 else print(__doc__) or EXIT_USER_ERROR)
