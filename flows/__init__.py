"""Prefect flows. Importing this package sets what a local run needs before Prefect reads its settings.

Everything is a default: a deployment's environment or a shell that says otherwise wins. The user's profiles of Prefect
are not read, as the home is the project's own: a run by hand reports to no server that nobody named for it.
"""

import atexit
import gc
import os
from pathlib import Path

_DEFAULTS = {
    "PREFECT_HOME": str(Path.cwd() / ".prefect"),  # the project's own, not the user's
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    # The temporary server took 16 s to start on two cores, 40 s the first time; Prefect gives up after 20 by default.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    # Log lines reach the server within 2 s: they are sent every 2 s by default, and read from the worker every 0.2 s.
    "PREFECT_LOGGING_TO_API_BATCH_INTERVAL": "0.5",
    # flows/automations.py marks a run Crashed that is silent for 120 s; Prefect sends one every 180 s.
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    # One calm line an event; Prefect's own chatter only from warnings on.
    "PREFECT_LOGGING_LEVEL": "WARNING",
    "PREFECT_LOGGING_LOGGERS_PREFECT_FLOW_RUNS_LEVEL": "INFO",
    "PREFECT_LOGGING_LOGGERS_PREFECT_TASK_RUNS_LEVEL": "INFO",
    "PREFECT_LOGGING_FORMATTERS_STANDARD_FLOW_RUN_FMT": "%(asctime)s  %(message)s",
    "PREFECT_LOGGING_FORMATTERS_STANDARD_TASK_RUN_FMT": "%(asctime)s  %(message)s",
}
for _name, _value in _DEFAULTS.items():
    os.environ.setdefault(_name, _value)

# Prefect's import makes hundreds of thousands of objects that stay: looking for cycles among them at every 700th took
# 0.2 s of 1.4. At the end nothing needs collecting at all: that search took 0.4 s.
gc.set_threshold(20_000, 20, 20)
atexit.register(gc.freeze)
