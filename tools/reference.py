"""Write the page of every key: what it takes, its default and its meaning.

    python -m tools.reference [--output docs/keys.md]

Generated from the signatures that decode a recipe, and the docstrings beside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from components.standard_streams import run_command
from components.units import Count
from recipes.config import describe
from recipes.config.imports import import_path
from recipes.config.schema import Field, FieldKind, describe_kind, describe_type, fields_of
from recipes.config.toml import to_toml_value, write_value
from tools.shipped import PACKAGES, Shipped, fits, generate, shipped_classes, summary

INTRODUCTION = """\
# Every key

Written by `python -m tools.reference --output docs/keys.md`. `./run_train.sh my.toml --print-config` shows what each
key is in a run, and where that comes from; [recipes](recipes.md) says how files are put together, and
[`models/presets.py`](../models/presets.py) has the numbers of each model size.

A count is a whole number, or text such as "20M" or "1.5B". A key whose default is – has to be given. Where several
classes stand below a section its `use` names one of them, or [your own](components.md).

Besides its sections a file has `recipe`, the class of what is run (unset: pre-training), `extends`, a list of files to
merge below this one, and `import_paths`, a list of directories with modules of your own."""


class Page:
    """The lines of the page. A class is described where it is first met."""

    def __init__(self, recipes: Sequence[type], packages: Sequence[str]) -> None:
        self._shipped = list(shipped_classes(packages, recipes))
        self._told: set[type] = set()

    def recipe(self, cls: type) -> Iterator[str]:
        """The sections of a recipe that none before it had."""
        yield from ("", f"## `{import_path(cls)}`", "", summary(cls))
        had, values = [], {}
        for name, key in fields_of(cls).items():
            item = key.kind.item if key.kind.form == "dict" else None
            kind = item if item is not None and item.form == "slot" else key.kind  # [hooks] holds tables of slots
            if kind.form not in ("section", "slot"):
                values[name] = key
            elif kind.annotation in self._told:
                had.append(f"`[{name}]`")
            else:
                yield from self._part(f"[{name}]", kind, "###")
        yield from self._keys("[]", values, describe(cls), "##")
        if had:
            yield from ("", f"Its other sections are those above: {', '.join(had)}.")

    def _part(self, title: str, kind: FieldKind, level: str) -> Iterator[str]:
        """A table of the file, and the tables in it."""
        cls = kind.annotation
        self._told.add(cls)
        yield from ("", f"{level} `{title}`")
        if said := summary(cls).removeprefix(title).removeprefix(": "):
            yield from ("", said[0].upper() + said[1:])
        if kind.form == "section":
            yield from self._keys(title, fields_of(cls), describe(cls), level)
        else:
            for each in self._fitting(cls):
                if each.cls not in self._told:
                    self._told.add(each.cls)
                    yield from ("", f"{level}# `{each.uses[-1]}`", "", summary(each.cls))
                    yield from self._keys(title, fields_of(each.cls), describe(each.cls), f"{level}#")

    def _keys(self, title: str, keys: Mapping[str, Field], docs: Mapping[str, str], level: str) -> Iterator[str]:
        if not keys:
            return
        yield from ("", "| key | value | default | |", "|---|---|---|---|")
        inner = []
        for name, key in keys.items():
            yield f"| `{name}` | {self._value(key.kind)} | {default(key)} | {_cell(docs.get(name, ''))} |"
            of = key.kind.item or key.kind
            if of.form == "section" and of.annotation not in self._told:
                inner.append((f"[{title[1:-1]}.{name}]".replace("[.", "["), of))
        for below, kind in inner:
            yield from self._part(below, kind, f"{level}#")

    def _value(self, kind: FieldKind) -> str:
        none = ', or `"none"`' if kind.optional else ""
        if kind.form == "list" and kind.item:
            return f"a list of: {self._value(kind.item)}{none}"
        if kind.form == "dict" and kind.item:
            return f"a table, name to: {self._value(kind.item)}{none}"
        if kind.form == "section":
            return f"a table of the keys below{none}"
        if kind.form == "slot":
            names = ", ".join(f"`{each.cls.__name__}`" for each in self._fitting(kind.annotation))
            return f"a table whose `use` names {f'one of: {names}' if names else 'a class of yours'}{none}"
        return _cell(describe_kind(kind).replace(describe_type(Count), "a count"))

    def _fitting(self, slot: type) -> list[Shipped]:
        return [each for each in self._shipped if fits(each.cls, slot)]


def default(key: Field) -> str:
    """As TOML would have it."""
    if key.required:
        return "–"
    value: Any = key.make_default()
    if key.kind.form != "leaf" and value is not None:
        return "" if value else "none"
    if value is None:
        return '`"none"`'
    if isinstance(value, Path) and value.is_relative_to(Path.home()):
        value = f"~/{value.relative_to(Path.home()).as_posix()}"
    return f"`{_cell(write_value(to_toml_value(value)))}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def page(recipes: Sequence[type], packages: Sequence[str] = PACKAGES) -> str:
    """The whole of it, as Markdown."""
    writer = Page(recipes, packages)
    lines = [INTRODUCTION, *(line for recipe in recipes for line in writer.recipe(recipe))]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    return generate("tools.reference", "Write the page of every key.", page, arguments)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
