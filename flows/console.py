"""A calm screen: one line an event, and an expected error without its traceback.

Prefect logs an exception with its traceback once for the task and once for the flow. For the errors that we raise on
purpose the message says everything, and the command line shows it at the end.
"""

from __future__ import annotations

import logging

from tasks.errors import UserError
from tasks.launch import Preempted, WorkerFailed

OURS = (UserError, Preempted, WorkerFailed)
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


def calm() -> None:
    """Install the filter on the loggers of Prefect's runs."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_Calm())
