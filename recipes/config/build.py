"""Build components from the merged tree: import, decode and construct them, and collect all problems."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from components.errors import InputError
from recipes.config.errors import Origin, Problem, did_you_mean, error_with_location, join_limited, problem_message
from recipes.config.imports import (
    UseError,
    describe_slot,
    import_class,
    import_path,
    import_root,
    missing_attributes,
    protocol_error,
)
from recipes.config.schema import Field, FieldKind, SignatureError, decode_value, describe_kind, fields_of
from recipes.config.toml import KeyPath, brief_value, join_key, to_toml_value
from recipes.config.tree import Array, Leaf, Node, Table, children, merge, problem_at, to_python, use_of

FAILED: Any = object()
"""Stands for a value that could not be built; `problems` has the reason."""

_RAISED = (Exception, SystemExit)
"""Exceptions of component code that are reported at the key, without a traceback."""


@dataclass(frozen=True)
class _Unknown:
    """A key that its table does not have; it is explained at the end, when the keys of all tables are known."""

    path: KeyPath
    node: Node
    siblings: Sequence[str]
    use: str | None


class ComponentBuilder:
    """Builds components from tables. The result is valid only if `problems` is empty at the end."""

    def __init__(self, folders: Sequence[Path], default: Origin) -> None:
        self.problems: list[Problem] = []
        self.import_roots: list[Path] = []
        """Those of `folders` that a component was imported from."""
        self._folders = folders
        self._default = default
        self._unknown: list[_Unknown] = []
        self._tables_with: dict[str, list[KeyPath]] = {}

    def build_recipe(self, cls: type, table: Table) -> tuple[Any, Table]:
        """Return the recipe, constructed from the whole configuration, and the tree of typed values."""
        recipe, tree = self._component(FieldKind("section", cls), table, ())
        self.problems += map(self._explain_unknown, self._unknown)
        return recipe, tree

    # Each of these returns the value and its node in the built tree, or FAILED after adding a problem.

    def _build(self, kind: FieldKind, node: Node, path: KeyPath) -> tuple[Any, Node]:
        if kind.form == "leaf":
            return self._leaf(kind, node, path)
        if isinstance(node, Leaf) and (node.value is None or (kind.optional and node.value == "none")):
            return None, Leaf(None, node.origin)
        if kind.form == "list" and isinstance(node, Leaf) and node.value == []:
            return _sequence(kind, []), Leaf([], node.origin)
        if not isinstance(node, Array if kind.form == "list" else Table):
            return self._fail(path, node, f"expected {_describe_table(kind, path)}"), Table({}, node.origin)
        if kind.form in ("list", "dict"):
            return self._collection(kind, node, path)
        assert isinstance(node, Table)
        return self._component(kind, node, path)

    def _leaf(self, kind: FieldKind, node: Node, path: KeyPath) -> tuple[Any, Leaf]:
        try:
            value = decode_value(kind, node)
        except ValueError as error:
            value = self._fail(path, node, f"{error}, not a table" if isinstance(node, Table) else str(error))
        except SignatureError as error:
            value = self._fail(path[:-1], None, f"the type of {path[-1]} cannot be a key: {error}", node.origin)
        except _RAISED as error:  # a custom validator
            value = self._fail(path, node, error_with_location(error))
        return value, Leaf(value, node.origin)

    def _collection(self, kind: FieldKind, node: Node, path: KeyPath) -> tuple[Any, Node]:
        assert kind.item is not None
        built = {key: self._build(kind.item, item, (*path, key)) for key, item in children(node)}
        values, nodes = ({key: pair[at] for key, pair in built.items()} for at in (0, 1))
        tree = Table(nodes, node.origin) if kind.form == "dict" else Array(tuple(nodes.values()), node.origin)
        if any(value is FAILED for value in values.values()):
            return FAILED, tree
        return values if kind.form == "dict" else _sequence(kind, list(values.values())), tree

    def _component(self, kind: FieldKind, table: Table, path: KeyPath) -> tuple[Any, Table]:
        """Build the component of a section or slot."""
        if kind.form == "section" and "use" in table.entries and table.entries["use"].origin is self._default:
            table = table.without("use") if use_of(table) == import_path(kind.annotation) else table
        cls = self._class(kind, table, path)
        if cls is None:
            return FAILED, Table({}, table.origin)
        try:
            fields = fields_of(cls)
        except SignatureError as error:
            named = (*path, "use") if "use" in table.entries else path
            message = f"{import_path(cls)} is not a component: {error}"
            return self._fail(named, None, message, table.origin), Table({}, table.origin)
        nodes: dict[str, Node] = {}
        if "use" in table.entries:
            nodes["use"] = Leaf(use_of(table), table.entries["use"].origin)
        unknown = [key for key in table.entries if key not in fields and key != "use"]
        self._unknown += [_Unknown((*path, key), table.entries[key], list(fields), use_of(table)) for key in unknown]
        misspelled = {did_you_mean(key, fields) for key in unknown}
        arguments: dict[str, Any] = {}
        for name, field in fields.items():
            self._tables_with.setdefault(name, []).append(path)
            arguments[name], nodes[name] = self._field(field, cls, table, path, name in misspelled)
        tree = Table(nodes, table.origin)
        if any(value is FAILED for value in arguments.values()):
            return FAILED, tree
        return self._construct(cls, arguments, kind, tree, path), tree

    def _field(self, field: Field, cls: type, table: Table, parent: KeyPath, is_misspelled: bool) -> tuple[Any, Node]:
        path, kind = (*parent, field.name), field.kind
        nothing = Leaf(None, self._default, unset=not field.required)
        node = table.entries.get(field.name)
        default: Node | None = None
        is_layer = _is_of_tables(kind) and isinstance(node, Table)
        if field.required and kind.form == "section" and not kind.optional:
            default = Table({}, table.origin)  # the keys below it report what is required
        elif not field.required and (node is None or is_layer):
            # Only if it is used: creating it may fail, as for a path in a home directory that does not exist.
            try:
                default = self._default_of(field)
            except SignatureError as error:
                message = f"the default of {field.name} in {import_path(cls)} cannot be a key: {error}"
                return self._fail(parent, None, message, table.origin), nothing
            except _RAISED as error:
                message = f"its default cannot be created: {problem_message(error)}; set it"
                return self._fail(path, None, message, table.origin), nothing
        if node is None:
            node = default
        elif is_layer and isinstance(default, Table):
            node = merge(default, node, self.problems, path)
        if node is None and is_misspelled:
            return FAILED, nothing
        if node is None:
            what = describe_kind(kind) if kind.form == "leaf" else _describe_table(kind, path)
            return self._fail(path, None, f"required, but not set: {what}", table.origin), nothing
        value, built = self._build(kind, node, path)
        is_default_none = node is default and isinstance(node, Leaf) and node.value is None
        return value, nothing if value is None and is_default_none else built

    def _default_of(self, field: Field) -> Node:
        """Return the default of a key as if it had been written. Raises what creating it raises, and SignatureError."""
        if field.make_default is field.kind.annotation:  # a section: its keys have their defaults
            return Table({"use": Leaf(import_path(field.kind.annotation), self._default)}, self._default)
        default = field.make_default()
        try:
            return self._tree_of(field.kind, default)
        except TypeError as error:
            raise SignatureError(str(error)) from None

    def _tree_of(self, kind: FieldKind, value: Any) -> Node:
        """Return a default as if it had been written, so that the keys of the user are merged over it."""
        if value is None or kind.form == "leaf":
            return Leaf(None if value is None else to_toml_value(value), self._default)
        if kind.form == "list":
            assert kind.item is not None
            items = tuple(self._tree_of(kind.item, item) for item in value)
            return Array(items, self._default) if items else Leaf([], self._default)
        if kind.form == "dict":
            assert kind.item is not None
            return Table({str(key): self._tree_of(kind.item, item) for key, item in value.items()}, self._default)
        cls: type = type(value)
        entries: dict[str, Node] = {"use": Leaf(import_path(cls), self._default)}
        for name, field in fields_of(cls).items():
            # Defaults of the class are omitted, so that a table means the same with and without this default.
            if hasattr(value, name) and not _is_default(field, getattr(value, name)):
                entries[name] = self._tree_of(field.kind, getattr(value, name))
        return Table(entries, self._default)

    def _class(self, kind: FieldKind, table: Table, path: KeyPath) -> type | None:
        """Return the class that `use` names, or else that of the section; None after adding a problem."""
        named, path = table.entries.get("use"), (*path, "use")
        if named is None:
            if kind.form == "section":
                return kind.annotation
            message = f'name the {describe_slot(kind.annotation)}: use = "package.module:Name"'
            self._fail(path, None, message, table.origin)
            return None
        use = use_of(table)
        try:
            if use is None:
                raise UseError('expected an import path, "package.module:Name"')
            cls = import_class(use, self._folders)
            if mismatch := protocol_error(cls, kind.annotation):
                raise UseError(f"{use} cannot be used as {describe_slot(kind.annotation)}: {mismatch}")
        except UseError as error:
            self._fail(path, named, str(error))
            return None
        root = import_root(use, self._folders)
        if root is not None and root not in self.import_roots:
            self.import_roots.append(root)
        return cls

    def _construct(self, cls: type, arguments: dict[str, Any], kind: FieldKind, tree: Table, path: KeyPath) -> Any:
        try:
            component = cls(**arguments)
            mismatch = missing_attributes(component, kind.annotation) if kind.form == "slot" else None
        except _RAISED as error:  # reported at the key that the error names, or else at the table
            keys: tuple[str, ...] = ()
            message = problem_message(error)
            if isinstance(error, InputError) and error.key.partition(".")[0] in tree.entries:
                keys, message = tuple(error.key.split(".")), error.message
            self.problems.append(replace(problem_at(tree, keys, message), path=join_key((*path, *keys))))
            return FAILED
        if mismatch:
            message = f"{import_path(cls)} cannot be used as {describe_slot(kind.annotation)}: {mismatch}"
            return self._fail((*path, "use"), None, message, tree.origin)
        return component

    def _fail(self, path: KeyPath, node: Node | None, message: str, origin: Origin | None = None) -> Any:
        """Add a problem at `node`, or else at `origin`, and return FAILED."""
        value = None if node is None or to_python(node) is None else brief_value(to_python(node))
        origin = origin or (node.origin if node else self._default)
        self.problems.append(Problem(origin.source, join_key(path), message, value))
        return FAILED

    def _explain_unknown(self, unknown: _Unknown) -> Problem:
        *parent, name = unknown.path
        key = str(name)
        is_section = not parent and isinstance(unknown.node, Table)
        table = f"[{join_key(parent)}]" + (f" of {unknown.use}" if unknown.use else "")
        message = f"unknown section [{key}]" if is_section else f"unknown key in {table}" if parent else "unknown key"
        hints = []
        if match := did_you_mean(key, [*unknown.siblings, *(["use"] if parent else [])]):
            hints.append(f"did you mean {f'[{match}]' if is_section else match}?")
        elsewhere = key if key in self._tables_with else did_you_mean(key, self._tables_with)
        tables = [table for table in self._tables_with.get(elsewhere or "", ()) if table not in ((), tuple(parent))]
        if tables and (elsewhere == key or not match):
            names = join_limited([f"[{join_key(table)}]" for table in tables], limit=3)
            hints.append(f"{elsewhere} is a key of {names}")
        if not hints:
            hints.append(f"{'its keys are' if parent else 'known:'} {join_limited(unknown.siblings)}")
        value = None if isinstance(unknown.node, (Table, Array)) else brief_value(unknown.node.value)
        return Problem(unknown.node.origin.source, join_key(unknown.path), f"{message}; {'; '.join(hints)}", value)


def _is_of_tables(kind: FieldKind) -> bool:
    """Return whether the keys of a table are merged with those of the default: a component, or components by name."""
    return kind.form in ("section", "slot") or (
        kind.form == "dict" and kind.item is not None and _is_of_tables(kind.item)
    )


def _is_default(field: Field, value: Any) -> bool:
    """Return whether `value` equals the default of the key."""
    try:
        return not field.required and bool(value == field.make_default())
    except _RAISED:
        return False


def _sequence(kind: FieldKind, items: list[Any]) -> Any:
    return tuple(items) if typing.get_origin(kind.annotation) is tuple else items


def _describe_table(kind: FieldKind, path: KeyPath) -> str:
    """Return how to write a value that consists of tables."""
    name = join_key(path)
    if kind.form == "slot":
        return f'a table [{name}] with use = "package.module:Name", naming the {describe_slot(kind.annotation)}'
    return f"an array of tables, [[{name}]]" if kind.form == "list" else f"a table, [{name}]"
