"""Why a stage is stale: the differences between the order that was computed and the one that is wanted, in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAX_REASONS = 4


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What changed from one order's `what` to another's."""
    old, new = (_flatten(what) for what in _name_models(before, after))
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    return list(dict.fromkeys(_describe(name, old.get(name), new.get(name)) for name in names))


def shortened(changes: list[str]) -> list[str]:
    """At most `MAX_REASONS` of them, and how many more there are."""
    more = [f"and {len(changes) - MAX_REASONS} more"] if len(changes) > MAX_REASONS else []
    return changes[:MAX_REASONS] + more


def _name_models(before: dict[str, Any], after: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Where one starts from a stage and the other from the base, say just that: their fields have nothing in common."""
    for role in ("init", "model"):
        models = [what.get(role, {}) for what in (before, after)]
        if ("key" in models[0]) != ("key" in models[1]):
            names = [model.get("stage", "the base model") for model in models]
            before, after = before | {role: names[0]}, after | {role: names[1]}
    return before, after


def _flatten(value: Any, name: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names; a list of files as one entry a file."""
    if isinstance(value, dict):
        return {
            k: v for key, item in value.items() for k, v in _flatten(item, f"{name}.{key}" if name else key).items()
        }
    if isinstance(value, list) and value and isinstance(value[0], dict) and "path" in value[0]:
        return {f"{name} {item['path']}": item.get("sha256", item) for item in value}
    return {name: value}


def _describe(name: str, before: Any, after: Any) -> str:
    leaf = name.split(".")[-1]
    if leaf == "key":  # an upstream stage; its own line says why
        return f"{name.split('.')[-2]} changed"
    if isinstance(before or after, str) and len(before or after) == 64:  # a digest says nothing to a reader
        gone = "is no longer read" if Path(name.partition(" ")[2]).is_file() else "is gone"
        return f"{name} {'is new' if before is None else gone if after is None else 'changed'}"
    return f"{leaf} {_short(before)} -> {_short(after)}"


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
