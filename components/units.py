"""Quantities as users write them: `tokens = "20M"`. The one vocabulary every component may import.

A component's typed constructor is its TOML schema, so a count that accepts "20M" has to be a type, and one that every
component shares. This module imports nothing of the project.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

_SUFFIX = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_COUNT = re.compile(r"\s*(\d[\d_]*(?:\.\d+)?)\s*([kmbt]?)\s*", re.IGNORECASE)


def parse_count(value: Any) -> Any:
    """An integer from `20_000_000`, `"20M"`, `"1.5B"` or `"4_096"`; K, M, B and T are powers of ten.

    Raises a ValueError, of the kind that is reported as "expected ...", for other text. What is not text is returned as
    it is, for the type check that follows.
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
    """A short human form: 12_345_678 -> "12.3M"; not meant to be parsed back."""
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


def expand_home(path: str | Path) -> Path:
    """`path` with a leading `~` or `~user` replaced. Raises ValueError where there is no such home directory."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{path}: there is no such home directory") from None
