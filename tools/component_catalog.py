"""The recipes and components of the project, and the slots they fit.

generate_keys_doc.py and generate_json_schema.py write documents from it.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from recipes.config.imports import import_class, import_path, protocol_error
from recipes.config.schema import SignatureError, fields_of
from recipes.interfaces import AnyProbe
from recipes.probes import POINTS as PROBE_POINTS

RECIPES = ("recipes.pretrain:Pretrain", "recipes.critical_batch:CriticalBatch", "recipes.evaluate:Evaluate")
"""The first is the default of a file without `recipe`."""
PACKAGES = ("components", "models")
ANY_OF = {AnyProbe: PROBE_POINTS}
"""Slots whose components have at least one of some methods."""


@dataclass(frozen=True)
class CatalogEntry:
    """A class of the project, with every import path that may name it, the defining module first."""

    cls: type
    import_paths: tuple[str, ...]


def component_classes(packages: Sequence[str], recipes: Sequence[type] = ()) -> Iterator[CatalogEntry]:
    """Yield every public class defined in `packages`, except those that are a section of one of `recipes`.

    Packages that re-export a class add their import paths.
    """
    modules = [importlib.import_module(name) for name in packages]
    for package in list(modules):
        found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        modules += filter(None, (_module(module.name, packages) for module in found))
    placed = {key.kind.annotation for recipe in recipes for key in fields_of(recipe).values()}
    for module in modules:
        for name, cls in sorted(vars(module).items()):
            if isinstance(cls, type) and cls.__module__ == module.__name__ and not name.startswith("_"):
                parents = [other for other in modules if module.__name__.startswith(f"{other.__name__}.")]
                uses = [f"{parent.__name__}:{name}" for parent in parents if getattr(parent, name, None) is cls]
                if cls not in placed:
                    yield CatalogEntry(cls, (import_path(cls), *uses))


def fits_slot(cls: type, slot: type) -> bool:
    """Return whether `cls` is a component that fits `slot`.

    It has all methods of the slot, or any of those in `ANY_OF`. Nothing fits a slot with neither, such as [hooks.NAME].
    """
    if slot in ANY_OF:
        return is_component(cls) and any(callable(getattr(cls, name, None)) for name in ANY_OF[slot])
    if not any(inspect.isfunction(member) and not name.startswith("_") for name, member in inspect.getmembers(slot)):
        return False
    return is_component(cls) and protocol_error(cls, slot) is None


def is_component(cls: type) -> bool:
    """Return whether the parameters of `cls` can be keys of a table."""
    try:
        fields_of(cls)
    except SignatureError:
        return False
    return True


def docstring_summary(cls: type) -> str:
    """Return the first paragraph of the class's docstring, on one line."""
    return " ".join((inspect.getdoc(cls) or cls.__name__).split("\n\n")[0].split())


def run_generator(
    name: str, description: str, text_of: Callable[[Sequence[type]], str], arguments: Sequence[str] | None
) -> int:
    """Run the command line of a tool that writes `text_of` of the shipped recipes; return its exit status."""
    parser = argparse.ArgumentParser(prog=f"python -m {name}", description=description)
    parser.add_argument("--output", type=Path, help="file to write (default: standard output)")
    output = parser.parse_args(arguments).output
    text = text_of([import_class(recipe) for recipe in RECIPES])
    if output is None:
        sys.stdout.write(text)
    else:
        output.write_text(text, encoding="utf-8")
    return 0


def _module(name: str, packages: Sequence[str]) -> ModuleType | None:
    """Import a module; return None if it needs an extra that is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in packages:
            raise
        return None
