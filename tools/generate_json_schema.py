"""Write a JSON Schema of recipe files, for the completion and hover help of TOML editors.

    python -m tools.generate_json_schema [--output FILE]

The schema is generated from the types that decode a recipe, so it cannot disagree with them: the sections of the
recipes, and for every slot all shipped classes that fit it, selected by `use`. It is draft 7, with alternatives as
`oneOf`, which is what Taplo (Even Better TOML) reads. No key is required, since other files may provide it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from components.standard_streams import run_command
from recipes.config import describe
from recipes.config.imports import import_path
from recipes.config.schema import Field, FieldKind, fields_of, type_adapter
from recipes.config.toml import to_toml_value
from tools.component_catalog import (
    PACKAGES,
    CatalogEntry,
    component_classes,
    docstring_summary,
    fits_slot,
    run_generator,
)

Schema = dict[str, Any]

_PATHS: Schema = {"type": "array", "items": {"type": "string"}}
_EVERY_FILE: dict[str, Schema] = {
    "extends": _PATHS | {"description": "Files to merge below this one, left to right; relative to this file."},
    "import_paths": _PATHS | {"description": "Directories of your own modules; relative to this file."},
}
_IMPORT_PATH = r"^[\w.]+:[\w.]+$"


def recipe_schema(recipes: Sequence[type], packages: Sequence[str] = PACKAGES) -> Schema:
    """Return the schema of files for `recipes`, with the components found in `packages`."""
    writer = _Writer(list(component_classes(packages, recipes)))
    known = [import_path(recipe) for recipe in recipes]
    first, *others = (
        writer.table(recipe, "recipe", [name], _EVERY_FILE) for recipe, name in zip(recipes, known, strict=True)
    )
    strict = [first, *({**table, "required": ["recipe"]} for table in others)]
    other = {"title": "another recipe", "properties": {"recipe": _unknown_import_path(known)}, "required": ["recipe"]}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Powertrain recipe",
        "type": "object",
        "oneOf": [*strict, other],
        "definitions": writer.definitions,
    }


class _Writer:
    """Collects the schemas of slots and sections in `definitions`, since these may contain themselves."""

    def __init__(self, catalog: Sequence[CatalogEntry]) -> None:
        self.definitions: dict[str, Schema] = {}
        self._catalog = catalog

    def table(self, cls: type, selector: str, uses: Sequence[str], more: dict[str, Schema] | None = None) -> Schema:
        """Return the table of one class, whose `selector` key takes any of `uses`; `more` holds additional keys."""
        description, docs = docstring_summary(cls), describe(cls)
        selected = {selector: {"enum": list(uses), "description": description}}
        keys = {name: self._key(key, docs.get(name)) for name, key in fields_of(cls).items()}
        return {
            "title": uses[-1],
            "description": description,
            "properties": {**selected, **(more or {}), **keys},
            "additionalProperties": False,
        }

    def _key(self, key: Field, doc: str | None) -> Schema:
        schema = self._any(key.kind)
        if "$ref" in schema:  # draft 7 ignores all keys next to $ref
            schema = {"anyOf": [schema]}
        if doc:
            schema = {**schema, "description": doc}
        default = key.make_default() if key.kind.form == "leaf" and not key.required else None
        is_of_this_machine = isinstance(default, Path) and default.is_absolute()
        return schema if default is None or is_of_this_machine else {**schema, "default": to_toml_value(default)}

    def _any(self, kind: FieldKind) -> Schema:
        schema = self._present(kind)
        return {"anyOf": [schema, {"const": "none", "description": "without"}]} if kind.optional else schema

    def _present(self, kind: FieldKind) -> Schema:
        """Return the schema of the kind without its "none"."""
        if kind.form == "slot":
            return self._reference(kind.annotation, self._slot)
        if kind.form == "section":
            return self._reference(kind.annotation, self._section)
        if kind.item is None or kind.form == "leaf":
            schema = type_adapter(kind.annotation).json_schema()
            return {} if "$defs" in schema else schema  # its references start at another root: leave it open
        item = self._any(kind.item)
        if kind.form == "list":
            return {"type": "array", "items": item}
        return {"type": "object", "additionalProperties": item}

    def _reference(self, cls: type, write: Callable[[type], Schema]) -> Schema:
        name = import_path(cls).replace(":", ".")
        if name not in self.definitions:
            self.definitions[name] = {}  # defined before it is written: it may refer to itself
            self.definitions[name] = write(cls)
        return {"$ref": f"#/definitions/{name}"}

    def _section(self, cls: type) -> Schema:
        """Return the schema of the section's default class, or of a replacement that `use` names."""
        known = [import_path(cls)]
        return {
            "type": "object",
            "description": docstring_summary(cls),
            "oneOf": [self.table(cls, "use", known), _custom_class(known)],
        }

    def _slot(self, slot: type) -> Schema:
        """Return the schema of a shipped class that fits the slot, a custom class, or a table without `use`.

        Another file may hold the `use`.
        """
        fitting = [entry for entry in self._catalog if fits_slot(entry.cls, slot)]
        tables = [{**self.table(each.cls, "use", each.import_paths), "required": ["use"]} for each in fitting]
        names = sorted({name for table in tables for name in table["properties"]} - {"use"})
        elsewhere = {"title": "`use` is in another file", "propertyNames": {"enum": names}}
        custom = _custom_class([use for each in fitting for use in each.import_paths])
        return {"type": "object", "description": docstring_summary(slot), "oneOf": [*tables, custom, elsewhere]}


def _custom_class(known: Sequence[str]) -> Schema:
    """Return an open table for a class that is not in `known`."""
    return {"title": "a custom class", "properties": {"use": _unknown_import_path(known)}, "required": ["use"]}


def _unknown_import_path(known: Sequence[str]) -> Schema:
    """Return the schema of an import path that is not in `known`."""
    return {
        "type": "string",
        "pattern": _IMPORT_PATH,
        "not": {"enum": list(known)},
        "description": "package.module:Name",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    def text(recipes: Sequence[type]) -> str:
        return json.dumps(recipe_schema(recipes), indent=2, ensure_ascii=False) + "\n"

    return run_generator(
        "tools.generate_json_schema", "JSON Schema of recipe files, for TOML editors.", text, arguments
    )


if __name__ == "__main__":
    raise SystemExit(run_command(main))
