"""Types of the flows' parameters: what Prefect's form offers, and our own message for what it should not have got.

The JSON schema goes into a deployment: the form shows lists of tags and stages, and the server refuses a value outside
them, naming them. Whatever slips through (a form with its validation off, a script) meets the validators when the run
starts: it fails at once, with our message as its state's. They also read the files that the values name.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, Field

from tasks.config import HARDWARE_FILE, load_config, load_hardware
from tasks.errors import UserError
from tasks.hardware import AUTO
from tasks.plan import GROUPS
from tasks.roots import hold_config
from tasks.yaml_file import SafeLoader, nearest

DEFAULT_CONFIG = "configs/regulator.yaml"
# Below the project's root, and a YAML file. The server checks it, and a run that a worker started does once more, as a
# form's validation can be switched off; the command line takes any path. The server answers that the value "does not
# match" this text, so the text says in words what is allowed: `(?!)` matches nothing.
CONFIG_WORDS = "a YAML file below the project, as configs/regulator.yaml"
CONFIG_PATTERN = rf"(?!){CONFIG_WORDS}|^(?!/)(?!.*\.\.)[A-Za-z0-9_./-]+\.ya?ml$"

STARTED_BY_WORKER = "PREFECT__FLOW_RUN_ID"  # Prefect sets it for the process of a deployment's run


def hardware_tags() -> list[str]:
    """The rows of configs/hardware.yaml, as the flows' import finds them, and `auto`; none outside a project."""
    try:
        return [*yaml.load(HARDWARE_FILE.read_text(), Loader=SafeLoader), AUTO]
    except OSError:
        return []


def _check_config(path: str) -> str:
    by_worker = STARTED_BY_WORKER in os.environ
    if by_worker and not re.fullmatch(CONFIG_PATTERN, path):
        raise UserError(f"a deployment's config cannot be '{path}'", where="parameter config", allowed=CONFIG_WORDS,
                        todo="copy the file there; on the command line (--config) any path may stand")  # fmt: skip
    if by_worker:  # a link below the project may lead out of it
        hold_config(Path(path))
    load_config(path)
    return path


def _check_hardware(tag: str) -> str:
    if tag != AUTO:
        load_hardware(tag)
    return tag


def _check_stage(stage: str) -> str:
    if stage not in GROUPS:
        raise UserError(f"no stage is called '{stage}'{nearest(stage, GROUPS)}", allowed=", ".join(GROUPS),
                        todo="choose one of them, or none")  # fmt: skip
    return stage


def _one_of(values: list[str]) -> Any:
    return Field(json_schema_extra={"enum": list(values)})


_CONFIGS = sorted(str(path) for path in Path("configs").glob("*.yaml") if path != HARDWARE_FILE)

Config = Annotated[
    str,
    AfterValidator(_check_config),
    Field(json_schema_extra={"pattern": CONFIG_PATTERN, "examples": list(_CONFIGS)}),
]
Hardware = Annotated[str, AfterValidator(_check_hardware), _one_of(hardware_tags())]
HardwareOrDefault = Hardware | None
Stage = Annotated[str, AfterValidator(_check_stage), _one_of([*GROUPS])]
