"""Numbers as the report shows them. Nothing is shown for None and NaN, except where a reader would miss it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any


def number(value: Any, digits: int = 4) -> str:
    """An integer with separators, a float with `digits`; nothing for None."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def signed(value: float, digits: int = 4) -> str:
    """A difference, with its sign; a dash for none."""
    return "\u2013" if math.isnan(value) else f"{value:+,.{digits}f}".replace("-", "\u2212")


def percentage_points(share: float | None) -> str:
    """A difference of shares, without a sign."""
    return "" if share is None else f"{share * 100:.2f} pp"


def percent(share: float | None, digits: int = 2) -> str:
    """A share as percentage."""
    return "" if share is None or math.isnan(share) else f"{share:.{digits}%}"


def setting(value: Any) -> str:
    """A value of a config as it would be written."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {setting(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(setting(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else number(value)


def listed(values: Iterable[Any]) -> str:
    """Values with commas between."""
    return ", ".join(map(str, values))


def wrapper_text(wrapper: str | None) -> str:
    """How the processes shared the model."""
    return "not sharded" if wrapper in (None, "none") else str(wrapper)
