"""What a YAML value may be, in the words of who writes YAML: from pydantic's error to `allowed:` and `do:`."""

from __future__ import annotations

import math
import re
from typing import Any

_INTEGER = "an integer, as 20_000"
_NUMBER = "a number, as 0.1 or 2.0e-5 (a share is a fraction)"
_TEXT = "text; in quotes where YAML would read a number or a date"
# By pydantic's type of error (https://docs.pydantic.dev/latest/errors/validation_errors/); the others say it well.
_WORDS = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), _INTEGER),
    **dict.fromkeys(("float_type", "float_parsing"), _NUMBER),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("list_type", "tuple_type"), "a list, as [a, b]"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "`key: value` lines"),
    "string_type": _TEXT,
    "missing": "a list with one value more",
    "too_long": "a list with fewer values",
    "string_pattern_mismatch": "letters, digits, '_', '.' and '-', the first one a letter or a digit",
}
_UNITS = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9}


def allowed_words(error: dict[str, Any]) -> str:
    """What is allowed in place of the error's value."""
    said = str(error["msg"]).removeprefix("Input should be ").removeprefix("Value error, ")
    return _WORDS.get(error["type"]) or said[:1].lower() + said[1:]


def meant(error: dict[str, Any]) -> str:
    """`write 20_000` for 20k, 7e5, 10 % or 0,1; nothing for what cannot be guessed."""
    whole, text = _WORDS.get(error["type"]) == _INTEGER, str(error["input"]).strip()
    if not whole and _WORDS.get(error["type"]) != _NUMBER:
        return ""
    if whole and re.fullmatch(r"\d{1,3}(,\d{3})+", text):
        number = float(text.replace(",", ""))
    elif not whole and re.fullmatch(r"\d+,\d+", text):
        number = float(text.replace(",", "."))
    elif found := re.fullmatch(r"([\d_]*\.?\d+(?:e[+-]?\d+)?)\s*([kmbg%]?)", text, re.IGNORECASE):
        number = float(found[1].replace("_", "")) * (_UNITS if whole else {"": 1, "%": 0.01}).get(
            found[2].lower(), math.nan
        )
    else:
        return ""
    if not math.isfinite(number):
        return ""
    if not whole:
        return f"write {number:g}"
    return f"write {round(number):_}" if abs(number - round(number)) < 1e-6 else ""


def shown(value: object) -> str:
    """A value as YAML spells it."""
    if value is None:
        return "empty"
    return str(value).lower() if isinstance(value, bool) else repr(value) if isinstance(value, str) else str(value)
