"""Quantities as written in recipes, such as `tokens = "20M"`.

The typed constructor of a component is its TOML schema, so a count that accepts "20M" is a type, shared by all
components. This module imports nothing of the project.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

_SUFFIX = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_COUNT = re.compile(r"\s*(\d[\d_]*(?:\.\d+)?)\s*([kmbt]?)\s*", re.IGNORECASE)


def parse_count(value: Any) -> Any:
    """Return the integer of `20_000_000`, `"20M"`, `"1.5B"` or `"4_096"`; K, M, B and T are powers of 1000.

    Raises a ValueError, reported as "expected ...", for other text. Values that are not text are returned unchanged,
    for the type check that follows.
    """
    if not isinstance(value, str):
        return value
    match = _COUNT.fullmatch(value)
    if match is None:
        raise PydanticCustomError("expected", 'a count such as 20_000_000, "20M" or "1.5B"')
    digits, suffix = match.group(1).replace("_", ""), match.group(2).lower()
    whole, _, fraction = digits.partition(".")
    scale = _SUFFIX[suffix]
    scaled = int(whole + fraction) * scale
    if scaled % 10 ** len(fraction):
        raise PydanticCustomError("expected", "a whole number ({value} is not)", {"value": repr(value)})
    return scaled // 10 ** len(fraction)


def format_count(count: float) -> str:
    """Return a short form for display: 12_345_678 -> "12.35M"."""
    for suffix, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(count) >= scale:
            return f"{count / scale:.4g}{suffix}"
    return f"{count:.4g}"


_SCHEMA = WithJsonSchema(
    {
        "anyOf": [
            {"type": "integer", "minimum": 0},
            {"type": "string", "pattern": r"^\d[\d_]*(\.\d+)?\s*[kKmMbBtT]?$"},
        ],
        "description": 'a whole number, or text such as "20M" or "1.5B"',
    }
)

Count = Annotated[int, BeforeValidator(parse_count), Field(ge=0, lt=2**62), _SCHEMA]
"""A whole number >= 0 that TOML may write as "20M"."""

Tokens = Count
"""A number of tokens."""

PositiveCount = Annotated[int, BeforeValidator(parse_count), Field(gt=0, lt=2**62), _SCHEMA]
"""A whole number >= 1 that TOML may write as "20M"."""
