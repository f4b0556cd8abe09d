"""Secrets from Prefect's Secret blocks into the environment of a run, and nowhere else.

    STEEP_SECRET_BLOCKS=HF_TOKEN=hf-token,WANDB_API_KEY=wandb          VARIABLE=BLOCK, several with commas

Loaded when a run starts, never when it is deployed: Prefect stores a deployment's job variables in plain text. Workers
inherit the environment; no order, artifact or report records it. A variable that is set already wins.
"""

from __future__ import annotations

import os
import re

from prefect.blocks.system import Secret

from tasks.errors import UserError

VARIABLE = "STEEP_SECRET_BLOCKS"
FORM = re.compile(r"([A-Za-z_]\w*)=([a-z0-9-]+)", re.ASCII)


def load_secrets() -> None:
    """Set the variables that STEEP_SECRET_BLOCKS names. Raises `UserError` for a block that is not there."""
    for position, pair in enumerate(os.environ.get(VARIABLE, "").split(","), start=1):
        if not pair:
            continue
        entry = FORM.fullmatch(pair.strip())
        if entry is None:  # not shown: it may be the secret itself
            raise UserError(f"entry {position} of {VARIABLE} is none", where=VARIABLE,
                            allowed="VARIABLE=BLOCK, several with commas; BLOCK of a-z, 0-9 and -")  # fmt: skip
        name, block = entry.groups()
        if name not in os.environ:
            os.environ[name] = _value(name, block)


def _value(name: str, block: str) -> str:
    try:
        secret = Secret.load(block)
    except ValueError:  # the block's name is not shown either: it may be the secret
        raise UserError(
            f"{VARIABLE} names a Secret block for {name} which the server does not hold",
            where=VARIABLE,
            todo=f'make it in the UI (Blocks, Secret), or: python -c "from prefect.blocks.system import Secret; '
            f"Secret(value=input()).save('BLOCK')\", and set {VARIABLE}={name}=BLOCK",
        ) from None
    return str(secret.get())  # type: ignore[union-attr]
