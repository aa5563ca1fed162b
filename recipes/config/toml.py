"""What tomli lacks: write keys and values as TOML, and find the line of every key.

tomli does not report positions, so `line_index` scans the text a second time to find where keys begin. It assumes valid
TOML.
"""

from __future__ import annotations

import datetime
import enum
import json
import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

import tomli

from components.storage.address import display, hide_passwords

KeyPath = tuple[str | int, ...]
"""Keys from the root; an integer is an index into an array."""

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def quote_key(key: str) -> str:
    """Return `key` with quotes where TOML needs them."""
    return key if _BARE.fullmatch(key) else _string(key)


def join_key(keys: Iterable[str | int]) -> str:
    """Return a dotted key such as `training.total_tokens`; keys are quoted where TOML needs it."""
    return ".".join(quote_key(str(key)) for key in keys)


def split_key(dotted: str) -> tuple[str, ...]:
    """Return the parts of a dotted key, quoted or not. Raises ValueError for text that is not a TOML key."""
    parts = dotted.split(".")
    if all(_BARE.fullmatch(part) for part in parts):
        return tuple(parts)
    if "\n" in dotted or "=" in re.sub(r"\"(?:[^\"\\]|\\.)*\"|'[^']*'", "", dotted):
        raise ValueError(f"{dotted!r} is not a key")
    node: Any = tomli.loads(f"{dotted} = 0")
    keys = []
    while isinstance(node, dict):
        (key, node), *others = node.items()
        keys.append(key)
        assert not others
    return tuple(keys)


def parse_value(text: str) -> Any:
    """Return `text` parsed as TOML, or `text` itself if it is not a TOML value, so that text needs no quotes."""
    try:
        document = tomli.loads(f"value = {text}")
    except (tomli.TOMLDecodeError, RecursionError):
        return text
    return document["value"] if len(document) == 1 else text


def write_value(value: Any) -> str:
    """Return `value` as TOML on one line; tables are written inline. Raises TypeError if TOML cannot express it."""
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
    raise TypeError(f"TOML cannot express {type(value).__name__}")


def to_toml_value(value: Any) -> Any:
    """Return the TOML value of a Python value. Raises TypeError if TOML cannot express it."""
    if isinstance(value, enum.Enum):
        return to_toml_value(value.value)
    if isinstance(value, PurePath):
        return display(Path(value))
    if isinstance(value, (set, frozenset)):
        return sorted(to_toml_value(item) for item in value)
    if isinstance(value, (list, tuple)):
        return [to_toml_value(item) for item in value]
    if isinstance(value, Mapping):
        return {key: to_toml_value(item) for key, item in value.items()}
    write_value(value)  # raises TypeError
    return value


def brief_value(value: Any) -> str:
    """Return `write_value(value)` for a message, cut if it is long."""
    return brief(write_value(value))


def brief(text: str) -> str:
    """Return `text` without passwords of addresses, cut to 72 characters."""
    text = hide_passwords(text)
    return text if len(text) <= 72 else text[:69] + "..."


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's escapes are TOML's, but for DEL


_KEY = r"""(?:"(?:[^"\\]|\\.)*"|'[^']*'|[^\s.=\[\]{}"'#,]+)"""
_DOTTED = re.compile(rf"{_KEY}(?:[ \t]*\.[ \t]*{_KEY})*")
_BLANK = re.compile(r"(?:\s|#[^\n]*)*")
_EQUALS = re.compile(r"[ \t]*=[ \t]*")
_SCALAR = re.compile(
    r"""
      \"{3} (?:[^\\]|\\.)*? \"{3} \"{0,2}     # up to two quotes may stand before the closing three
    | '{3}  .*?              '{3}  '{0,2}
    | \"   (?:[^\"\\]|\\.)*  \"
    | '    [^']*              '
    | [^,\]}\n\#]+
    """,
    re.DOTALL | re.VERBOSE,
)


def line_index(text: str) -> dict[KeyPath, int]:
    """Return the line, from 1, on which every table, key and array item of valid TOML `text` is first named."""
    scanner = _Scanner(text)
    scanner.document()
    return scanner.lines


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.lines: dict[KeyPath, int] = {(): 1}
        self._starts = [0, *(match.end() for match in re.finditer("\n", text))]
        self._tables_in: dict[KeyPath, int] = {}  # array of tables -> number of its tables so far

    def document(self) -> None:
        table: KeyPath = ()
        while self._skip_blank() < len(self.text):
            if self.text[self.at] == "[":
                table = self._header()
            else:
                self._assignment(table)

    def _header(self) -> KeyPath:
        """Scan a header, `[a.b]` or `[[a.b]]`, and return the path of its table."""
        is_array = self.text.startswith("[[", self.at)
        start = self.at
        self.at += 2 if is_array else 1
        self._skip_blank()
        *parents, last = self._dotted_key()
        self._skip_blank()
        self.at += 2 if is_array else 1
        path = (*self._enter((), tuple(parents), start), last)
        if is_array:
            self.lines.setdefault(path, self._line(start))
            index = self._tables_in.get(path, 0)
            self._tables_in[path] = index + 1
            path = (*path, index)
        self.lines[path] = self._line(start)  # the header replaces an earlier mention in the header of a sub-table
        return path

    def _assignment(self, table: KeyPath) -> None:
        start = self.at
        path = self._enter(table, self._dotted_key(), start)
        self._match(_EQUALS)
        self._value(path)

    def _value(self, path: KeyPath) -> None:
        opening = self.text[self.at]
        if opening not in "[{":
            self._match(_SCALAR)
            return
        self.at += 1
        index = 0
        while self.text[self._skip_blank()] not in "]}":
            if opening == "{":
                self._assignment(path)
            else:
                item = (*path, index)
                self.lines[item] = self._line(self.at)
                self._value(item)
                index += 1
            if self.text[self._skip_blank()] == ",":
                self.at += 1
        self.at += 1

    def _enter(self, path: KeyPath, keys: tuple[str, ...], start: int) -> KeyPath:
        """Return the path of `keys` below `path`, through the latest table of every array of tables."""
        for key in keys:
            path = (*path, key)
            self.lines.setdefault(path, self._line(start))
            if path in self._tables_in:
                path = (*path, self._tables_in[path] - 1)
        return path

    def _dotted_key(self) -> tuple[str, ...]:
        return split_key(self._match(_DOTTED))

    def _skip_blank(self) -> int:
        self._match(_BLANK)
        return self.at

    def _match(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self.text, self.at)
        assert match is not None, f"not TOML at character {self.at}"
        self.at = match.end()
        return match.group()

    def _line(self, offset: int) -> int:
        return bisect_right(self._starts, offset)
