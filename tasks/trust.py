"""Whether code that a model brings along may run: only when the run's file says so in words.

    model: {path: ..., trust_remote_code: true}

A model's `auto_map` names Python files beside its weights; loading it runs them, with all rights of whoever trains.
Nothing said: such a model is refused. `false`: it is loaded with transformers' own class, if there is one. `true`: the
files run in preparation (tokenizer), training and evaluation; their digests are part of the keys; the report says so.

The order carries the answer (`how.trust_remote_code`); a worker declares it once, before it loads anything.
"""

from __future__ import annotations

import os
from pathlib import Path

from tasks.errors import UserError
from tasks.model_files import read_model_json
from tasks.stage import Order

VARIABLE = "STEEP_TRUST_REMOTE_CODE"  # from a worker to its own processes; what the shell says is overwritten


def declare(order: Order) -> None:
    """In a worker, before it loads anything: what its order says holds for this process and those it starts."""
    os.environ[VARIABLE] = "1" if order.how.get("trust_remote_code") is True else "0"


def trusted() -> bool:
    """What every `from_pretrained` of a worker is given as `trust_remote_code`."""
    return os.environ.get(VARIABLE) == "1"


def code_named_by(folder: Path, where: str = "model.path") -> list[str]:
    """The classes of the model's own code that its config and its tokenizer's name; empty for most models."""
    named: list[str] = []
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            auto_map = read_model_json(folder / name, where).get("auto_map") or {}
            for value in auto_map.values() if isinstance(auto_map, dict) else [auto_map]:  # old tokenizers: a list
                classes = value if isinstance(value, list) else [value]  # a tokenizer names a slow and a fast one
                named += [str(one) for one in classes if one]
    return list(dict.fromkeys(named))


def check_trust(folder: Path, said: bool | None, where: str) -> None:
    """Raise `UserError` for a model that brings code of which the config says nothing."""
    named = code_named_by(folder, where)
    if named and said is None:
        raise UserError(
            f"the model brings code of its own ({', '.join(named[:3])}), which loading it would run",
            where=where,
            allowed="model.trust_remote_code: true (its code runs), or false (transformers' own class is used)",
            todo=f"read the Python files in {folder}, then say in the config which of the two you want",
        )
