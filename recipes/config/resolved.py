"""The configuration as decoded: a tree of typed values that can say where each came from, and print itself as TOML."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from recipes.config import values
from recipes.config.lines import KeyPath
from recipes.config.problems import Origin, Problem
from recipes.config.toml import brief, join_key, quote_key, write_value


@dataclass(frozen=True)
class Leaf:
    """A value of the configuration, and where it comes from."""

    value: Any
    origin: Origin
    unset: bool = False
    """The key was left out, and its default is None."""

    @property
    def toml(self) -> str:
        return write_value("none" if self.value is None else values.encode(self.value))


@dataclass(frozen=True)
class Branch:
    """A table."""

    entries: dict[str, Entry]
    origin: Origin


@dataclass(frozen=True)
class Rows:
    """An array of tables, at least one of them."""

    items: list[Entry]
    origin: Origin


Entry = Leaf | Branch | Rows


def leaves(entry: Entry, path: KeyPath = ()) -> Iterator[tuple[str, Leaf]]:
    """Every leaf with its dotted path, in the order in which `dump` writes them."""
    if isinstance(entry, Leaf):
        yield join_key(path), entry
    for key, item in _children(entry):
        yield from leaves(item, (*path, key))


def components(made: Any, entry: Entry, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Each component with its path, `made` first, which was constructed of the table `entry`."""
    if isinstance(entry, Branch) and not isinstance(made, dict):
        yield path, made
    for key, item in _children(entry):
        if not isinstance(item, Leaf):
            with suppress(Exception):  # a class of the user's may keep what it was given under another name
                below = made[key] if isinstance(made, (dict, list, tuple)) else getattr(made, key)
                yield from components(below, item, (*path, key))


def problem_at(root: Branch, path: KeyPath, message: str) -> Problem:
    """A problem with the entry at `path`, told where that entry, or the nearest table around it, was written."""
    entry: Entry = root
    for key in path:
        below = dict(_children(entry)).get(int(key) if isinstance(entry, Rows) and str(key).isdecimal() else key)
        if below is None:
            break
        entry = below
    else:
        if isinstance(entry, Leaf):
            return Problem(entry.origin.where, join_key(path), message, brief(entry.toml))
    return Problem(entry.origin.where, join_key(path), message)


def dump(root: Branch, provenance: bool) -> str:
    """Launchable TOML with every key, defaults too; `provenance` adds where each value comes from."""
    return "\n".join(_table(root, (), provenance)).strip("\n") + "\n"


def _table(table: Branch, path: KeyPath, provenance: bool) -> Iterator[str]:
    """The lines of a table's own keys, then those of its sub-tables."""
    subtables = []
    for key, entry in table.entries.items():
        if not isinstance(entry, Leaf):
            subtables.append((key, entry))
        elif entry.unset:
            yield f"# {quote_key(key)} is unset"
        else:
            comment = f"  # {_on_one_line(entry.origin.where)}" if provenance else ""
            yield f"{quote_key(key)} = {entry.toml}{comment}"
    for key, entry in subtables:
        rows = [*_children(entry)] if isinstance(entry, Rows) else []
        for item_path, item in [((*path, key, index), row) for index, row in rows] or [((*path, key), entry)]:
            assert isinstance(item, Branch)
            header = join_key(part for part in item_path if isinstance(part, str))
            yield ""
            yield f"[[{header}]]" if rows else f"[{header}]"
            yield from _table(item, item_path, provenance)


def _children(entry: Entry) -> list[tuple[Any, Entry]]:
    if isinstance(entry, Leaf):
        return []
    items = enumerate(entry.items) if isinstance(entry, Rows) else entry.entries.items()
    return sorted(items, key=lambda pair: not isinstance(pair[1], Leaf))  # as TOML wants it: a table's own keys first


def _on_one_line(text: str) -> str:
    """File names may hold anything but a comment may not."""
    return "".join(char if char.isprintable() else "?" for char in text)
