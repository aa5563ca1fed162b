"""A configuration made of another one, by a recipe that starts runs of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli

from recipes.config.imports import import_class
from recipes.config.lines import KeyPath
from recipes.config.load import Config, resolve
from recipes.config.problems import Origin
from recipes.config.signatures import keys_of
from recipes.config.toml import join_key
from recipes.config.tree import DEFAULT, Table, graft, merge


def derive(config: Config, recipe: str, changes: Mapping[str, Any], *, why: str) -> Config:
    """`config` as one of `recipe`, with `changes` as the last layer. Its components are constructed anew.

    Sections that `recipe` does not take are left out. Where a value comes from is kept; for the changes it is `why`.
    """
    leaves, default = config.leaves, Origin(DEFAULT, Path.cwd())

    def origin(path: KeyPath) -> Origin:
        leaf = leaves.get(join_key(path))
        return leaf.origin if leaf is not None else default

    table = graft(tomli.loads(config.to_toml(provenance=False)), origin)
    assert isinstance(table, Table)
    import_paths = [Path(folder) for folder in config.leaves["import_paths"].value] if "import_paths" in leaves else []
    known = {"recipe", *keys_of(import_class(recipe, import_paths))}
    table = table.without(*(key for key in table.entries if key not in known))
    merged = merge(table, graft({"recipe": recipe, **changes}, lambda _: Origin(why, Path.cwd())), [])
    assert isinstance(merged, Table)
    return resolve(merged, import_paths, import_paths=import_paths, default=default, default_recipe=recipe)
