"""Which recipes and components come with the project, and which slot each fits: for what is generated from them."""

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

RECIPES = ("recipes.pretrain:Pretrain", "recipes.critical_batch:CriticalBatch", "recipes.evaluate:Evaluate")
"""The first is what a file is for that names none."""
PACKAGES = ("components", "models")


@dataclass(frozen=True)
class Shipped:
    """A class of the project, with every import path that may name it, its home first."""

    cls: type
    uses: tuple[str, ...]


def shipped_classes(packages: Sequence[str], recipes: Sequence[type] = ()) -> Iterator[Shipped]:
    """Every public class defined in `packages`, but those that are a section of one of `recipes` already.

    A package that re-exports a class is one more way to name it.
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
                    yield Shipped(cls, (import_path(cls), *uses))


def fits(cls: type, slot: type) -> bool:
    """Return whether `cls` is a component that fits `slot`. Nothing fits one without methods, such as [hooks.NAME]."""
    if not any(inspect.isfunction(member) and not name.startswith("_") for name, member in inspect.getmembers(slot)):
        return False
    try:
        fields_of(cls)
    except SignatureError:
        return False
    return protocol_error(cls, slot) is None


def summary(cls: type) -> str:
    """The first paragraph of the class's docstring, on one line."""
    return " ".join((inspect.getdoc(cls) or cls.__name__).split("\n\n")[0].split())


def generate(
    name: str, description: str, text_of: Callable[[Sequence[type]], str], arguments: Sequence[str] | None
) -> int:
    """The command line of a tool that writes something of the shipped recipes."""
    parser = argparse.ArgumentParser(prog=f"python -m {name}", description=description)
    parser.add_argument("--output", type=Path, help="file to write; standard output if left out")
    output = parser.parse_args(arguments).output
    text = text_of([import_class(recipe) for recipe in RECIPES])
    if output is None:
        sys.stdout.write(text)
    else:
        output.write_text(text, encoding="utf-8")
    return 0


def _module(name: str, packages: Sequence[str]) -> ModuleType | None:
    """None for a module that needs an extra which is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in packages:
            raise
        return None
