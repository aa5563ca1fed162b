"""From the merged tree to constructed components: import, decode, construct, and collect all that is wrong."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recipes.config import values
from recipes.config.fit import lacks, misfit, slot_name
from recipes.config.imports import UseError, home_of, import_class, import_path
from recipes.config.lines import KeyPath
from recipes.config.problems import Origin, Problem, closest, describe_error, error_message, listed
from recipes.config.resolved import Branch, Entry, Leaf, Rows, problem_at
from recipes.config.signatures import Key, Shape, SignatureError, keys_of
from recipes.config.toml import brief_value, join_key
from recipes.config.tree import Array, Node, Table, Value, merge, plain, used

FAILED: Any = object()
"""In place of what could not be made; a problem says why."""

_RAISED = (Exception, SystemExit)
"""What the code of a component may raise, and is reported at the key: never a traceback, never a silent exit."""


@dataclass(frozen=True)
class _Unknown:
    """A key that its table does not take; explained at the end, when the keys of all tables are known."""

    path: KeyPath
    node: Node
    siblings: Sequence[str]
    use: str | None


class Decoder:
    """Makes components of tables. What it made is worth something only if `problems` is empty at the end."""

    def __init__(self, folders: Sequence[Path], default: Origin) -> None:
        self.problems: list[Problem] = []
        self.homes: list[Path] = []
        """Those of `folders` that a component came from."""
        self._folders = folders
        self._default = default
        self._unknown: list[_Unknown] = []
        self._tables_with: dict[str, list[KeyPath]] = {}

    def recipe(self, cls: type, table: Table) -> tuple[Any, Branch]:
        """The recipe, constructed of the whole configuration, and the configuration as decoded."""
        made = self._component(Shape("section", cls), table, ())
        self.problems += map(self._explain_unknown, self._unknown)
        return made

    # Each of these returns the value and its entry in the configuration's tree; FAILED after noting a problem.

    def _any(self, shape: Shape, node: Node, path: KeyPath) -> tuple[Any, Entry]:
        if shape.kind == "leaf":
            return self._leaf(shape, node, path)
        if isinstance(node, Value) and (node.value is None or (shape.optional and node.value == "none")):
            return None, Leaf(None, node.origin)
        if shape.kind == "list":
            return self._list(shape, node, path)
        if not isinstance(node, Table):
            return self._fail(path, node, f"expected {_table_words(shape, path)}"), Branch({}, node.origin)
        if shape.kind == "dict":
            return self._dict(shape, node, path)
        return self._component(shape, node, path)

    def _leaf(self, shape: Shape, node: Node, path: KeyPath) -> tuple[Any, Entry]:
        try:
            value = values.decode(shape, node)
        except ValueError as error:
            value = self._fail(path, node, f"{error}, not a table" if isinstance(node, Table) else str(error))
        except SignatureError as error:
            value = self._fail(path[:-1], None, f"the type of {path[-1]} is unfit for a key: {error}", node.origin)
        except _RAISED as error:  # a validator of the user's
            value = self._fail(path, node, describe_error(error))
        return value, Leaf(value, node.origin)

    def _list(self, shape: Shape, node: Node, path: KeyPath) -> tuple[Any, Entry]:
        assert shape.of is not None
        if not isinstance(node, Array) and plain(node) != []:
            return self._fail(path, node, f"expected {_table_words(shape, path)}"), Rows([], node.origin)
        if not isinstance(node, Array):
            return _sequence(shape, []), Leaf([], node.origin)
        made = [self._any(shape.of, item, (*path, index)) for index, item in enumerate(node.items)]
        rows = Rows([entry for _, entry in made], node.origin)
        if any(value is FAILED for value, _ in made):
            return FAILED, rows
        return _sequence(shape, [value for value, _ in made]), rows

    def _dict(self, shape: Shape, node: Table, path: KeyPath) -> tuple[Any, Entry]:
        assert shape.of is not None
        made = {key: self._any(shape.of, item, (*path, key)) for key, item in node.entries.items()}
        branch = Branch({key: entry for key, (_, entry) in made.items()}, node.origin)
        if any(value is FAILED for value, _ in made.values()):
            return FAILED, branch
        return {key: value for key, (value, _) in made.items()}, branch

    def _component(self, shape: Shape, node: Table, path: KeyPath) -> tuple[Any, Branch]:
        """The component of a section or slot, constructed."""
        if shape.kind == "section" and "use" in node.entries and node.entries["use"].origin is self._default:
            node = node.without("use") if used(node) == import_path(shape.annotation) else node
        cls = self._class(shape, node, path)
        if cls is None:
            return FAILED, Branch({}, node.origin)
        try:
            keys = keys_of(cls)
        except SignatureError as error:
            where = (*path, "use") if "use" in node.entries else path
            name = import_path(cls)
            return self._fail(where, None, f"{name} is no component: {error}", node.origin), Branch({}, node.origin)
        entries: dict[str, Entry] = {}
        if "use" in node.entries:
            entries["use"] = Leaf(used(node), node.entries["use"].origin)
        strange = [key for key in node.entries if key not in keys and key != "use"]
        self._unknown += [_Unknown((*path, key), node.entries[key], list(keys), used(node)) for key in strange]
        misspelt = {closest(key, keys) for key in strange}
        arguments: dict[str, Any] = {}
        for key in keys.values():
            self._tables_with.setdefault(key.name, []).append(path)
            arguments[key.name], entries[key.name] = self._key(key, cls, node, path, key.name in misspelt)
        branch = Branch(entries, node.origin)
        if any(value is FAILED for value in arguments.values()):
            return FAILED, branch
        return self._construct(cls, arguments, shape, branch, path), branch

    def _key(self, key: Key, cls: type, table: Table, parent: KeyPath, is_misspelt: bool) -> tuple[Any, Entry]:
        path, shape = (*parent, key.name), key.shape
        nothing = Leaf(None, self._default, unset=not key.required)
        written = table.entries.get(key.name)
        default: Node | None = None
        is_layer = shape.kind in ("section", "slot") and isinstance(written, Table)
        if key.required and shape.kind == "section" and not shape.optional:
            default = Table({}, table.origin)  # its own keys say what is required
        elif not key.required and (written is None or is_layer):
            # Only then: making it may fail, as for a path in a home directory where there is none.
            try:
                default = self._default_of(key)
            except SignatureError as error:
                message = f"the default of {key.name} in {import_path(cls)} is unfit for a key: {error}"
                return self._fail(parent, None, message, table.origin), nothing
            except _RAISED as error:
                message = f"its default cannot be made: {error_message(error)}; set it"
                return self._fail(path, None, message, table.origin), nothing
        node = default if written is None else written
        if node is None:
            return FAILED if is_misspelt else self._missing(shape, path, table), nothing
        if shape.kind in ("section", "slot") and isinstance(node, Table) and isinstance(default, Table):
            node = merge(default, node, self.problems, path)
        value, entry = self._any(shape, node, path)
        is_default_none = isinstance(default, Value) and default.value is None
        if value is None and node.origin is self._default and is_default_none:
            return None, nothing
        return value, entry

    def _default_of(self, key: Key) -> Node:
        """The default of a key as if it had been written. Raises what making it raises, and SignatureError."""
        if key.make_default is key.shape.annotation:  # a section: what its own keys have by default
            return Table({"use": Value(import_path(key.shape.annotation), self._default)}, self._default)
        default = key.make_default()
        try:
            return self._tree_of(key.shape, default)
        except TypeError as error:
            raise SignatureError(str(error)) from None

    def _tree_of(self, shape: Shape, value: Any) -> Node:
        """A default as if it had been written: what the user writes is then one more layer over it."""
        if value is None or shape.kind == "leaf":
            return Value(None if value is None else values.encode(value), self._default)
        assert shape.of is not None or shape.kind in ("section", "slot")
        if shape.kind == "list":
            items = tuple(self._tree_of(shape.of, item) for item in value)  # type: ignore[arg-type]
            return Array(items, self._default) if items else Value([], self._default)
        if shape.kind == "dict":
            tables = {str(key): self._tree_of(shape.of, item) for key, item in value.items()}  # type: ignore[arg-type]
            return Table(tables, self._default)
        cls: type = type(value)
        entries: dict[str, Node] = {"use": Value(import_path(cls), self._default)}
        for name, key in keys_of(cls).items():
            # What the class says itself is left to it, so that a table reads the same with this default and without.
            if hasattr(value, name) and not _is_default(key, getattr(value, name)):
                entries[name] = self._tree_of(key.shape, getattr(value, name))
        return Table(entries, self._default)

    def _class(self, shape: Shape, node: Table, path: KeyPath) -> type | None:
        """The class that `use` names, or the section's own."""
        named = node.entries.get("use")
        where = (*path, "use")
        if named is None:
            if shape.kind == "section":
                return shape.annotation
            message = f'name the {slot_name(shape.annotation)}: use = "package.module:Name"'
            self._fail(where, None, message, node.origin)
            return None
        use = used(node)
        if use is None:
            self._fail(where, named, 'expected an import path, "package.module:Name"')
            return None
        try:
            cls = import_class(use, self._folders)
        except UseError as error:
            self._fail(where, named, str(error))
            return None
        if complaint := misfit(cls, shape.annotation):
            self._fail(where, named, f"{use} is no {slot_name(shape.annotation)}: {complaint}")
            return None
        home = home_of(use, self._folders)
        if home is not None and home not in self.homes:
            self.homes.append(home)
        return cls

    def _construct(self, cls: type, arguments: dict[str, Any], shape: Shape, branch: Branch, path: KeyPath) -> Any:
        try:
            made = cls(**arguments)
            complaint = lacks(made, shape.annotation) if shape.kind == "slot" else None
        except _RAISED as error:
            return self._refused(error_message(error), branch, path)
        if complaint:
            message = f"{import_path(cls)} is no {slot_name(shape.annotation)}: {complaint}"
            return self._fail((*path, "use"), None, message, branch.origin)
        return made

    def _refused(self, said: str, branch: Branch, path: KeyPath) -> Any:
        """A constructor's complaint: at the key it names first, as in `eta: must be positive`, or at the table."""
        key, colon, rest = said.partition(": ")
        keys, message = ((key,), rest) if colon and key in branch.entries else ((), said)
        found = problem_at(branch, keys, message)
        self.problems.append(replace(found, path=join_key((*path, *keys))))
        return FAILED

    def _missing(self, shape: Shape, path: KeyPath, table: Table) -> Any:
        if shape.kind == "leaf":
            what = values.expectation(shape)
        else:
            what = _table_words(shape, path)
        return self._fail(path, None, f"required, but not set: {what}", table.origin)

    def _fail(self, path: KeyPath, node: Node | None, message: str, origin: Origin | None = None) -> Any:
        """Notes a problem with what is written at `node`, or else with something at `origin`."""
        value = None if node is None or plain(node) is None else brief_value(plain(node))
        where = origin or (node.origin if node else self._default)
        self.problems.append(Problem(where.where, join_key(path), message, value))
        return FAILED

    def _explain_unknown(self, unknown: _Unknown) -> Problem:
        *parent, name = unknown.path
        key = str(name)
        is_section = not parent and isinstance(unknown.node, Table)
        table = f"[{join_key(parent)}]" + (f" of {unknown.use}" if unknown.use else "")
        message = f"unknown section [{key}]" if is_section else f"unknown key in {table}" if parent else "unknown key"
        hints = []
        if match := closest(key, [*unknown.siblings, *(["use"] if parent else [])]):
            hints.append(f"did you mean {f'[{match}]' if is_section else match}?")
        elsewhere = key if key in self._tables_with else closest(key, self._tables_with)
        tables = [table for table in self._tables_with.get(elsewhere or "", ()) if table not in ((), tuple(parent))]
        if tables and (elsewhere == key or not match):
            hints.append(f"{elsewhere} is a key of " + listed([f"[{join_key(table)}]" for table in tables], limit=3))
        if not hints:
            hints.append(f"its keys are {listed(unknown.siblings)}" if parent else f"known: {listed(unknown.siblings)}")
        value = None if isinstance(unknown.node, (Table, Array)) else brief_value(plain(unknown.node))
        return Problem(unknown.node.origin.where, join_key(unknown.path), f"{message}; {'; '.join(hints)}", value)


def _is_default(key: Key, value: Any) -> bool:
    """Whether `value` is certainly what the key has by default."""
    try:
        return not key.required and bool(value == key.make_default())
    except _RAISED:
        return False


def _sequence(shape: Shape, items: list[Any]) -> Any:
    return tuple(items) if typing.get_origin(shape.annotation) is tuple else items


def _table_words(shape: Shape, path: KeyPath) -> str:
    """How to write what is no leaf."""
    name = join_key(path)
    if shape.kind == "slot":
        return f'a table [{name}] with use = "package.module:Name", naming the {slot_name(shape.annotation)}'
    return f"an array of tables, [[{name}]]" if shape.kind == "list" else f"a table, [{name}]"
