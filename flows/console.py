"""A calm screen: one line an event, an expected error without its traceback, and on a terminal one bar that moves.

Where the screen is a terminal, lines of progress redraw one line at its foot; the others scroll above it. Elsewhere (a
file, CI) a line is printed as it comes, and of progress what Prefect's server gets too: fewer as hours pass.

Prefect logs an exception with its traceback once for the task and once for the flow. For the errors that we raise on
purpose the message says everything, and the command line shows it at the end.
"""

from __future__ import annotations

import logging
import shutil
import sys
from typing import TextIO

from tasks.errors import UserError
from tasks.launch import Preempted, WorkerFailed
from tasks.progress import Reading, read

OURS = (UserError, Preempted, WorkerFailed)
BAR_CELLS = 24
CLEAR_LINE = "\r\x1b[2K"
ROUTINE = ("Finished in state Completed", "Finished in state Cached", "Beginning flow run", "Created task run")


class _Calm(logging.Filter):
    """Drops routine lines, and the tracebacks of errors that explain themselves."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if message.startswith(ROUTINE):
            return False
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        if isinstance(error, OURS):
            record.exc_info, record.exc_text = None, None
            record.msg, record.args = "failed: %s", (str(error).strip().split("\n")[0],)
        return "Finished in state Failed" not in message


class Bar(logging.Filter):
    """On the console's handler: takes lines of progress out and draws the last one at the foot of the screen."""

    def __init__(self, screen: TextIO) -> None:
        super().__init__()
        self.screen, self.drawn = screen, False

    def filter(self, record: logging.LogRecord) -> bool:
        """Draw a line of progress; clear the foot for any other line, which is printed then."""
        reading = read(record.getMessage())
        if reading is None or reading.share >= 1:  # the last line of progress stays on the screen
            if self.drawn:
                self.screen.write(CLEAR_LINE)
            self.drawn = False
            return True
        columns = shutil.get_terminal_size().columns
        self.screen.write(CLEAR_LINE + draw(reading)[: columns - 1])
        self.screen.flush()
        self.drawn = True
        return False


def draw(reading: Reading) -> str:
    """`cpt            [=====>       ]  42%  step 12/80, loss 2.13, ...`."""
    cells = int(BAR_CELLS * reading.share)
    bar = ("=" * cells + ">")[:BAR_CELLS].ljust(BAR_CELLS)
    return f"{reading.stage:<14}[{bar}] {reading.share:4.0%}  {reading.text}"


def calm() -> None:
    """Install the filters: on the loggers of Prefect's runs, and on the console where it is a terminal."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_Calm())
    if sys.stderr.isatty():
        bar = Bar(sys.stderr)
        for handler in logging.getLogger().handlers:
            if type(handler).__name__ == "PrefectConsoleHandler":
                handler.addFilter(bar)
