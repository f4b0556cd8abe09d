"""The work pools of prefect.yaml, how many runs each takes, and the tag of all that is ours.

Free of Prefect, whose import takes seconds.
"""

from __future__ import annotations

from pathlib import Path

import yaml

PREFECT_FILE = Path("prefect.yaml")
TAG = "steep"  # of every deployment and run of ours: a server may be shared with flows that are none of our business
# Runs at a time. Both GPU pools: one, so that no GPU is booked twice; a CPU run beside another is merely slower.
POOL_LIMITS = {"cpu": 2, "gpu-single": 1, "gpu-multi": 1}


def pools() -> list[str]:
    """The work pools that the deployments name."""
    deployments = yaml.safe_load(PREFECT_FILE.read_text())["deployments"]
    return list(dict.fromkeys(deployment["work_pool"]["name"] for deployment in deployments))


def pools_of_this_machine() -> list[str]:
    """`cpu`, and the pools for which there are GPUs."""
    num_gpus = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    fitting = {"cpu": True, "gpu-single": num_gpus >= 1, "gpu-multi": num_gpus >= 2}
    return [pool for pool in pools() if fitting.get(pool)]
