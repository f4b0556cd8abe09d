"""Secrets from Prefect's Secret blocks into the environment of a run, and nowhere else.

    STEEP_SECRET_BLOCKS=HF_TOKEN=hf-token,WANDB_API_KEY=wandb          VARIABLE=BLOCK, several with commas

Loaded when a run starts, never when it is deployed: Prefect stores a deployment's job variables in plain text. Workers
inherit the environment; no order, artifact or report records it. A variable that is set already wins.
"""

from __future__ import annotations

import os

from prefect.blocks.system import Secret

from tasks.errors import UserError

VARIABLE = "STEEP_SECRET_BLOCKS"


def load_secrets() -> None:
    """Set the variables that STEEP_SECRET_BLOCKS names. Raises `UserError` for a block that is not there."""
    for pair in filter(None, os.environ.get(VARIABLE, "").split(",")):
        name, equals, block = pair.strip().partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"{VARIABLE} holds '{pair}'", allowed="VARIABLE=BLOCK, several with commas")
        if name not in os.environ:
            os.environ[name] = _value(block)


def _value(block: str) -> str:
    try:
        secret = Secret.load(block)
    except ValueError:
        raise UserError(
            f"{VARIABLE} names the Secret block '{block}', which the server does not hold",
            todo=f'make it in the UI (Blocks, Secret), or: python -c "from prefect.blocks.system import Secret; '
            f"Secret(value=input()).save('{block}')\"",
        ) from None
    return str(secret.get())  # type: ignore[union-attr]
