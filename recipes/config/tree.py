"""A configuration before it has types: tables and values that know where they were written, in layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomli

from recipes.config.lines import KeyPath
from recipes.config.problems import Origin, Problem
from recipes.config.toml import brief_value, is_table_array, join_key, split_key

COMMAND_LINE = "command line"
DEFAULT = "default"


@dataclass(frozen=True)
class Override:
    """`--training.total_tokens=4B`, taken apart."""

    path: str
    """`training.total_tokens`"""
    text: str
    """`4B`, as typed. What it means depends on the type of the key, which is known only later."""


@dataclass(frozen=True)
class Value:
    """Anything that is not made of tables; None stands for a default of None, which TOML cannot write."""

    value: Any
    origin: Origin
    text: str | None = None
    """As typed on the command line."""


@dataclass(frozen=True)
class Table:
    entries: dict[str, Node]
    origin: Origin
    text: str | None = None

    def without(self, *keys: str) -> Table:
        return replace(self, entries={key: node for key, node in self.entries.items() if key not in keys})


@dataclass(frozen=True)
class Array:
    """An array of tables."""

    items: tuple[Node, ...]
    origin: Origin
    text: str | None = None


Node = Value | Table | Array


def graft(value: Any, origin_of: Callable[[KeyPath], Origin], path: KeyPath = (), text: str | None = None) -> Node:
    """The tree of a parsed TOML value."""
    origin = origin_of(path)
    if isinstance(value, dict):
        return Table({key: graft(item, origin_of, (*path, key)) for key, item in value.items()}, origin, text)
    if is_table_array(value):
        items = (graft(item, origin_of, (*path, index)) for index, item in enumerate(value))
        return Array(tuple(items), origin, text)
    return Value(value, origin, text)


def plain(node: Node) -> Any:
    """The TOML value of a tree."""
    if isinstance(node, Table):
        return {key: plain(item) for key, item in node.entries.items()}
    if isinstance(node, Array):
        return [plain(item) for item in node.items]
    return node.value


def used(table: Table) -> str | None:
    """What the table's `use` names, where it names anything."""
    node = table.entries.get("use")
    value = plain(node) if node else None
    return value.strip() if isinstance(value, str) else None


def merge(base: Node, over: Node, problems: list[Problem], path: KeyPath = (), *, same_layer: bool = False) -> Node:
    """`over`, with the keys of `base` that it leaves alone. Arrays and values are replaced whole.

    A table of a later layer with another `use` starts anew, since the keys below it were meant for another component.
    The command line may also name items of an array by number.
    """
    if not isinstance(over, Table):
        return over
    if isinstance(base, Table):
        if not same_layer and used(base) and used(over) and used(base) != used(over):
            return over
        entries = dict(base.entries)
        for key, node in over.entries.items():
            below = entries.get(key)
            entries[key] = node if below is None else merge(below, node, problems, (*path, key), same_layer=same_layer)
        is_touched_up = over.origin.where == COMMAND_LINE and base.origin.where != DEFAULT
        return Table(entries, base.origin if is_touched_up else over.origin)
    if over.origin.where != COMMAND_LINE or plain(base) in (None, "none"):
        return over
    if isinstance(base, Array):
        return _merge_items(base, over, problems, path, same_layer)
    problems.append(_problem(over, path, f"{join_key(path)} is {brief_value(plain(base))}{_at(base)}: it has no keys"))
    return base


def _merge_items(base: Array, over: Table, problems: list[Problem], path: KeyPath, same_layer: bool) -> Array:
    items = list(base.items)
    for key, node in over.entries.items():
        if key.isdecimal() and int(key) < len(items):
            items[int(key)] = merge(items[int(key)], node, problems, (*path, key), same_layer=same_layer)
        else:
            name, last = join_key(path), len(items) - 1
            message = f"{name} is an array of tables{_at(base)}: name one by its number, {name}.0 to {name}.{last}"
            problems.append(_problem(Table({key: node}, over.origin), path, message))
    return replace(base, items=tuple(items))


def _at(node: Node) -> str:
    return "" if node.origin.where == COMMAND_LINE else f" ({node.origin.where})"


def _problem(over: Table, path: KeyPath, message: str) -> Problem:
    """Told at the first key that the command line set below `path`."""
    keys, node = path, over
    while isinstance(node, Table) and node.entries:
        key, node = next(iter(node.entries.items()))  # type: ignore[assignment]
        keys = (*keys, key)
    return Problem(over.origin.where, join_key(keys), message, brief_value(plain(node)))


def command_line(overrides: Sequence[Override], cwd: Path, problems: list[Problem]) -> Table:
    """All overrides as one layer: their order matters only where the same key is given twice (the last one counts)."""
    origin = Origin(COMMAND_LINE, cwd)

    def layers() -> Iterator[Node]:
        for override in overrides:
            try:
                keys = split_key(override.path)
            except ValueError:
                problems.append(Problem(COMMAND_LINE, override.path, "not a key; write --section.key=value"))
                continue
            node = graft(*_parse(override.text), text=override.text, origin_of=lambda _: origin)
            for key in reversed(keys):
                node = Table({key: node}, origin)
            yield node

    layer: Node = Table({}, origin)
    for over in layers():
        layer = merge(layer, over, problems, same_layer=True)
    assert isinstance(layer, Table)
    return layer


def _parse(text: str) -> tuple[Any]:
    """The TOML value that `text` spells, or else `text` itself: quotes around text are not needed."""
    try:
        document = tomli.loads(f"value = {text}")
    except (tomli.TOMLDecodeError, RecursionError):
        return (text,)
    return (document["value"],) if len(document) == 1 else (text,)
