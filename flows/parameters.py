"""Types of the flows' parameters: what Prefect's form offers, and our own message for what it should not have got.

The JSON schema goes into a deployment, so the form shows a list of hardware tags and the server refuses a value outside
it. The validators run when a run starts, wherever it was started: they read the files that the values name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, Field

from tasks.config import HARDWARE_FILE, load_config, load_hardware
from tasks.hardware import AUTO

DEFAULT_CONFIG = "configs/regulator.yaml"
# Below the project's root, and a YAML file. The server checks it; the command line takes any path.
CONFIG_PATTERN = r"^(?!/)(?!.*\.\.)[A-Za-z0-9_./-]+\.ya?ml$"


def hardware_tags() -> list[str]:
    """The rows of configs/hardware.yaml, as the flows' import finds them, and `auto`; none outside a project."""
    try:
        return [*yaml.safe_load(HARDWARE_FILE.read_text()), AUTO]
    except OSError:
        return []


def _check_config(path: str) -> str:
    load_config(path)
    return path


def _check_hardware(tag: str) -> str:
    if tag != AUTO:
        load_hardware(tag)
    return tag


_CONFIGS = sorted(str(path) for path in Path("configs").glob("*.yaml") if path != HARDWARE_FILE)

Config = Annotated[
    str,
    AfterValidator(_check_config),
    Field(json_schema_extra={"pattern": CONFIG_PATTERN, "examples": list(_CONFIGS)}),
]
Hardware = Annotated[str, AfterValidator(_check_hardware), Field(json_schema_extra={"enum": list(hardware_tags())})]
HardwareOrDefault = Hardware | None
Stage = Literal["prepare", "cpt", "sft", "evaluate", "report"]
