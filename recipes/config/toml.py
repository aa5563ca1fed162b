"""Writing TOML: values, dotted keys, and a whole document read back as flat keys. (Reading is tomli's.)"""

from __future__ import annotations

import datetime
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tomli

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def quote_key(key: str) -> str:
    return key if _BARE.fullmatch(key) else _string(key)


def join_key(keys: Iterable[str | int]) -> str:
    """`training.total_tokens`; a key that is not bare is quoted, an index is a number."""
    return ".".join(quote_key(str(key)) for key in keys)


def split_key(dotted: str) -> tuple[str, ...]:
    """The parts of a dotted key, quoted or not. Raises ValueError if it is no TOML key."""
    parts = dotted.split(".")
    if all(_BARE.fullmatch(part) for part in parts):
        return tuple(parts)
    if "\n" in dotted or "=" in re.sub(r"\"(?:[^\"\\]|\\.)*\"|'[^']*'", "", dotted):
        raise ValueError(f"{dotted!r} is no key")
    node: Any = tomli.loads(f"{dotted} = 0")
    keys = []
    while isinstance(node, dict):
        (key, node), *others = node.items()
        keys.append(key)
        assert not others
    return tuple(keys)


def write_value(value: Any) -> str:
    """`value` as TOML on one line; tables are written inline. Raises TypeError for what TOML cannot hold."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, int):
        return str(value) if value.bit_length() < 10_000 else hex(value)  # Python writes no more than 4300 digits
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(write_value, value)) + "]"
    if isinstance(value, Mapping):
        inside = ", ".join(f"{quote_key(str(key))} = {write_value(item)}" for key, item in value.items())
        return f"{{ {inside} }}" if inside else "{}"
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    raise TypeError(f"TOML cannot hold {type(value).__name__}")


def brief_value(value: Any) -> str:
    """`write_value` for a message: cut where it is long."""
    return brief(write_value(value))


def brief(text: str, width: int = 72) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def flatten(toml_text: str) -> dict[str, Any]:
    """Dotted path -> value of every leaf of a document, such as a dump: two of them compare key by key.

    Tables in arrays are numbered: `data.sources.0.path`.
    """
    return dict(_leaves(tomli.loads(toml_text), ()))


def is_table_array(value: Any) -> bool:
    """Whether an array is one of tables, whose keys have paths of their own."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _leaves(node: Any, path: tuple[str | int, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, item in node.items():
            yield from _leaves(item, (*path, key))
    elif is_table_array(node):
        for index, item in enumerate(node):
            yield from _leaves(item, (*path, index))
    else:
        yield join_key(path), node


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's escapes are TOML's, but for DEL
