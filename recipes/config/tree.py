"""The tree of a configuration: tables, arrays of tables and values, each with the place where it was written.

Each file and the command line become a tree of TOML values. `merge` combines them, and building returns the same tree
with typed values, defaults included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomli

from recipes.config.errors import COMMAND_LINE, DEFAULT, Origin, Problem
from recipes.config.toml import (
    KeyPath,
    brief,
    brief_value,
    join_key,
    parse_value,
    quote_key,
    split_key,
    to_toml_value,
    write_value,
)


@dataclass(frozen=True)
class Override:
    """The two parts of `--training.total_tokens=4B`."""

    path: str
    """`training.total_tokens`"""
    text: str
    """`4B`, as typed; it is parsed later, when the type of the key is known."""


@dataclass(frozen=True)
class Leaf:
    """A value that holds no tables."""

    value: Any
    """The TOML value or, once built, the typed value. None is a default that TOML cannot express."""
    origin: Origin
    text: str | None = None
    """The value as typed on the command line."""
    unset: bool = False
    """Whether the key is missing and its default is None."""

    @property
    def toml(self) -> str:
        return write_value("none" if self.value is None else to_toml_value(self.value))


@dataclass(frozen=True)
class Table:
    """A table: keys with their nodes."""

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


Node = Leaf | Table | Array


def from_toml(value: Any, origin_of: Callable[[KeyPath], Origin], path: KeyPath = (), text: str | None = None) -> Node:
    """Return the tree of a parsed TOML value."""
    origin = origin_of(path)
    if isinstance(value, dict):
        return Table({key: from_toml(item, origin_of, (*path, key)) for key, item in value.items()}, origin, text)
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return Array(tuple(from_toml(item, origin_of, (*path, at)) for at, item in enumerate(value)), origin, text)
    return Leaf(value, origin, text)


def to_python(node: Node) -> Any:
    """Return the dicts, lists and values of a tree."""
    if isinstance(node, Table):
        return {key: to_python(item) for key, item in node.entries.items()}
    return [to_python(item) for item in node.items] if isinstance(node, Array) else node.value


def children(node: Node) -> list[tuple[Any, Node]]:
    """Return (key or index, node) for each child, in the order written."""
    if isinstance(node, Leaf):
        return []
    return list(node.entries.items()) if isinstance(node, Table) else list(enumerate(node.items))


def use_of(table: Table) -> str | None:
    """Return the `use` of a table, or None if it has none that is text."""
    node = table.entries.get("use")
    value = to_python(node) if node else None
    return value.strip() if isinstance(value, str) else None


def merge(base: Node, over: Node, problems: list[Problem], path: KeyPath = (), *, same_layer: bool = False) -> Node:
    """Return `over` with the keys of `base` that it does not set. Arrays and values are replaced as a whole.

    A table of a later layer with another `use` starts empty, since the keys of `base` are those of another component.
    The command line may also set items of an array by number.
    """
    if not isinstance(over, Table):
        return over
    from_command_line = over.origin.source == COMMAND_LINE
    if isinstance(base, Table):
        if not same_layer and use_of(base) and use_of(over) and use_of(base) != use_of(over):
            return over
        entries = dict(base.entries)
        for key, node in over.entries.items():
            below = entries.get(key)
            entries[key] = node if below is None else merge(below, node, problems, (*path, key), same_layer=same_layer)
        keeps_origin = from_command_line and base.origin.source != DEFAULT
        return Table(entries, base.origin if keeps_origin else over.origin)
    if not from_command_line or to_python(base) in (None, "none"):
        return over
    name = join_key(path)
    place = "" if base.origin.source == COMMAND_LINE else f" ({base.origin.source})"
    if isinstance(base, Leaf):
        problems.append(_problem_in(over, path, f"{name} is {brief_value(base.value)}{place}: it has no keys"))
        return base
    items = list(base.items)
    for key, node in over.entries.items():
        if key.isdecimal() and int(key) < len(items):
            items[int(key)] = merge(items[int(key)], node, problems, (*path, key), same_layer=same_layer)
        else:
            hint = f"write the number of an item, {name}.0 to {name}.{len(items) - 1}"
            problems.append(_problem_in(over, path, f"{name} is an array of tables{place}: {hint}", key))
    return replace(base, items=tuple(items))


def _problem_in(over: Table, path: KeyPath, message: str, key: str | None = None) -> Problem:
    """Return a problem with the first value that the command line set below `path`, or below `key` of it."""
    node: Node = over if key is None else Table({key: over.entries[key]}, over.origin)
    while isinstance(node, Table) and node.entries:
        key, node = next(iter(node.entries.items()))
        path = (*path, key)
    return Problem(over.origin.source, join_key(path), message, brief_value(to_python(node)))


def read_command_line(overrides: Sequence[Override], cwd: Path, problems: list[Problem]) -> Table:
    """Return all overrides as one layer. Of a key that is given twice the last value counts."""
    origin = Origin(COMMAND_LINE, cwd)
    layer: Node = Table({}, origin)
    for override in overrides:
        try:
            keys = split_key(override.path)
        except ValueError:
            problems.append(Problem(COMMAND_LINE, override.path, "not a key; write --section.key=value"))
            continue
        node = from_toml(parse_value(override.text), lambda _: origin, text=override.text)
        for key in reversed(keys):
            node = Table({key: node}, origin)
        layer = merge(layer, node, problems, same_layer=True)
    assert isinstance(layer, Table)
    return layer


def leaves(node: Node, path: KeyPath = ()) -> Iterator[tuple[str, Leaf]]:
    """Yield every leaf with its dotted path, in the order in which `dump` writes them."""
    if isinstance(node, Leaf):
        yield join_key(path), node
    for key, item in _values_first(node):
        yield from leaves(item, (*path, key))


# Functions of a built tree


def flatten(toml_text: str) -> dict[str, Any]:
    """Return dotted path -> value of every leaf of a document, so that two documents compare key by key.

    Tables in arrays are numbered: `data.sources.0.path`.
    """
    node = from_toml(tomli.loads(toml_text), lambda _: Origin("", Path()))
    return {path: leaf.value for path, leaf in leaves(node)}


def components(made: Any, node: Node, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yield each component with its path, beginning with `made`, which was constructed from the table `node`."""
    if isinstance(node, Table) and not isinstance(made, dict):
        yield path, made
    for key, item in _values_first(node):
        if not isinstance(item, Leaf):
            with suppress(Exception):  # a custom class may store an argument under another name
                below = made[key] if isinstance(made, (dict, list, tuple)) else getattr(made, key)
                yield from components(below, item, (*path, key))


def problem_at(root: Table, path: KeyPath, message: str) -> Problem:
    """Return a problem with the node at `path`, with the place where it, or else the nearest table, was written."""
    node: Node = root
    for key in path:
        below = dict(children(node)).get(int(key) if isinstance(node, Array) and str(key).isdecimal() else key)
        if below is None:
            return Problem(node.origin.source, join_key(path), message)
        node = below
    value = brief(node.toml) if isinstance(node, Leaf) else None
    return Problem(node.origin.source, join_key(path), message, value)


def written(node: Node) -> Node:
    """Return a built tree as it would be read from a file: with TOML values, and without unset keys."""
    if isinstance(node, Leaf):
        return Leaf("none" if node.value is None else to_toml_value(node.value), node.origin)
    if isinstance(node, Array):
        return Array(tuple(map(written, node.items)), node.origin)
    kept = {key: item for key, item in node.entries.items() if not (isinstance(item, Leaf) and item.unset)}
    return Table({key: written(item) for key, item in kept.items()}, node.origin)


def dump(root: Table, provenance: bool) -> str:
    """Return a complete recipe in TOML, defaults included; `provenance` adds where each value comes from."""
    return "\n".join(_dump_table(root, (), provenance)).strip("\n") + "\n"


def _dump_table(table: Table, path: KeyPath, provenance: bool) -> Iterator[str]:
    """Yield the lines of the values of a table, then those of its sub-tables."""
    for key, node in _values_first(table):
        if isinstance(node, Leaf):
            source = "".join(char if char.isprintable() else "?" for char in node.origin.source)  # a file name
            comment = f"  # {source}" if provenance else ""
            yield f"# {quote_key(key)} is unset" if node.unset else f"{quote_key(key)} = {node.toml}{comment}"
            continue
        header = join_key(part for part in (*path, key) if isinstance(part, str))
        tables = node.items if isinstance(node, Array) else (node,)
        for index, item in enumerate(tables):
            assert isinstance(item, Table)
            yield ""
            yield f"[[{header}]]" if isinstance(node, Array) else f"[{header}]"
            yield from _dump_table(item, (*path, key, index) if isinstance(node, Array) else (*path, key), provenance)


def _values_first(node: Node) -> list[tuple[Any, Node]]:
    """Return `children` in the order of TOML: values before sub-tables."""
    return sorted(children(node), key=lambda pair: not isinstance(pair[1], Leaf))
