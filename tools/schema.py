"""Write a JSON Schema of recipe files, for the completion and hover help of TOML editors.

    python -m tools.schema [--output FILE]

Generated from the types that decode a recipe, so it cannot disagree with them: the sections of the recipes, and
for every slot all the shipped classes that fit it, told apart by `use`. Draft 7, and alternatives as `oneOf`: what
Taplo (Even Better TOML) reads. Nothing is required, since a file may leave to others what it extends or is extended by.
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
from tools.shipped import PACKAGES, Shipped, fits, generate, shipped_classes, summary

Schema = dict[str, Any]

_PATHS: Schema = {"type": "array", "items": {"type": "string"}}
_EVERY_FILE: dict[str, Schema] = {
    "extends": _PATHS | {"description": "Files to merge below this one, left to right; relative to this file."},
    "import_paths": _PATHS | {"description": "Directories of your own modules; relative to this file."},
}
_IMPORT_PATH = r"^[\w.]+:[\w.]+$"


def recipe_schema(recipes: Sequence[type], packages: Sequence[str] = PACKAGES) -> Schema:
    """The schema of files for `recipes`; components are looked for in `packages`."""
    writer = _Writer(list(shipped_classes(packages, recipes)))
    known = [import_path(recipe) for recipe in recipes]
    first, *others = (
        writer.table(recipe, "recipe", [name], _EVERY_FILE) for recipe, name in zip(recipes, known, strict=True)
    )
    strict = [first, *({**table, "required": ["recipe"]} for table in others)]
    other = {"title": "another recipe", "properties": {"recipe": _foreign(known)}, "required": ["recipe"]}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Powertrain recipe",
        "type": "object",
        "oneOf": [*strict, other],
        "definitions": writer.definitions,
    }


class _Writer:
    """Writes the schemas of classes; those of slots and sections, which may nest in themselves, into `definitions`."""

    def __init__(self, shipped: Sequence[Shipped]) -> None:
        self.definitions: dict[str, Schema] = {}
        self._shipped = shipped

    def table(self, cls: type, selector: str, uses: Sequence[str], more: dict[str, Schema] | None = None) -> Schema:
        """The table of one class, which its `selector` may name in any of the ways `uses`; `more` are further keys."""
        said, docs = summary(cls), describe(cls)
        selected = {selector: {"enum": list(uses), "description": said}}
        keys = {name: self._key(key, docs.get(name)) for name, key in fields_of(cls).items()}
        return {
            "title": uses[-1],
            "description": said,
            "properties": {**selected, **(more or {}), **keys},
            "additionalProperties": False,
        }

    def _key(self, key: Field, doc: str | None) -> Schema:
        schema = self._any(key.kind)
        if "$ref" in schema:  # draft 7 ignores what stands beside it
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
        """The schema, were the key not optional."""
        if kind.form == "slot":
            return self._reference(kind.annotation, self._slot)
        if kind.form == "section":
            return self._reference(kind.annotation, self._section)
        if kind.item is None or kind.form == "leaf":
            schema = type_adapter(kind.annotation).json_schema()
            return {} if "$defs" in schema else schema  # its references are to its own root, not to ours: say less
        of = self._any(kind.item)
        return {"type": "array", "items": of} if kind.form == "list" else {"type": "object", "additionalProperties": of}

    def _reference(self, cls: type, write: Callable[[type], Schema]) -> Schema:
        name = import_path(cls).replace(":", ".")
        if name not in self.definitions:
            self.definitions[name] = {}  # begun: what it holds may refer to it
            self.definitions[name] = write(cls)
        return {"$ref": f"#/definitions/{name}"}

    def _section(self, cls: type) -> Schema:
        """The section's own class, or a replacement that `use` names."""
        known = [import_path(cls)]
        return {"type": "object", "description": summary(cls), "oneOf": [self.table(cls, "use", known), _own(known)]}

    def _slot(self, slot: type) -> Schema:
        """Any shipped class that fits, a class of the user's, or a table whose `use` stands in another file."""
        fitting = [shipped for shipped in self._shipped if fits(shipped.cls, slot)]
        tables = [{**self.table(each.cls, "use", each.uses), "required": ["use"]} for each in fitting]
        names = sorted({name for table in tables for name in table["properties"]} - {"use"})
        elsewhere = {"title": "`use` is in another file", "propertyNames": {"enum": names}}
        own = _own([use for each in fitting for use in each.uses])
        return {"type": "object", "description": summary(slot), "oneOf": [*tables, own, elsewhere]}


def _own(known: Sequence[str]) -> Schema:
    """The free table of a class that is none of those `known`."""
    return {"title": "a class of your own", "properties": {"use": _foreign(known)}, "required": ["use"]}


def _foreign(known: Sequence[str]) -> Schema:
    """An import path that is none of those `known`."""
    return {
        "type": "string",
        "pattern": _IMPORT_PATH,
        "not": {"enum": list(known)},
        "description": "package.module:Name",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    def text(recipes: Sequence[type]) -> str:
        return json.dumps(recipe_schema(recipes), indent=2, ensure_ascii=False) + "\n"

    return generate("tools.schema", "JSON Schema of recipe files, for TOML editors.", text, arguments)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
