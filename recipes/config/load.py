"""Loading a recipe: files, then overrides, then imports, then types, then checks; strictly in this order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from recipes.config.decode import FAILED, Decoder
from recipes.config.files import Reader
from recipes.config.imports import UseError, home_of, import_class, make_importable
from recipes.config.problems import ConfigError, Origin, Problem, absolute, describe_error
from recipes.config.resolved import Branch, Leaf, components, dump, leaves, problem_at
from recipes.config.toml import brief_value, join_key, split_key
from recipes.config.tree import DEFAULT, Node, Override, Table, Value, command_line, merge, plain

Checks = Callable[[Any], Iterable[tuple[str, str]]]
"""Of a constructed recipe: (dotted path, message) for everything that does not go together."""


@dataclass(frozen=True)
class Config:
    """A configuration that is complete and valid."""

    recipe: Any
    """The recipe, its components constructed."""
    root: Branch
    """Everything that was decided, as a tree."""

    @property
    def leaves(self) -> Mapping[str, Leaf]:
        """Dotted path -> value and origin, in the order of the dump."""
        return MappingProxyType(dict(leaves(self.root)))

    def components(self) -> Iterator[tuple[str, Any]]:
        """(dotted path, object) of every component of the recipe, but not the recipe itself."""
        return ((join_key(path), component) for path, component in components(self.recipe, self.root) if path)

    def to_toml(self, provenance: bool = True) -> str:
        """Launchable TOML with every key, defaults too; `provenance` adds where each value comes from, as comments.

        Loading it gives the same configuration, from any directory.
        """
        return dump(self.root, provenance)

    def problem(self, path: str, message: str) -> Problem:
        """A problem with the key or table at `path`, told where that was written."""
        return problem_at(self.root, split_key(path) if path else (), message)


def load(
    path: Path,
    overrides: Sequence[Override] = (),
    *,
    cwd: Path | None = None,
    default_recipe: str = "recipes.pretrain:Pretrain",
    extra_checks: Checks | None = None,
    own_code: bool = True,
) -> Config:
    """The configuration in the file at `path`, under `overrides`. Raises ConfigError with all that is wrong.

    Relative paths on the command line, and in defaults, are relative to `cwd`; those in a file, to that file.
    Modules of one's own are found beside the file and in `cwd`, unless `own_code` is false.
    `extra_checks` joins the recipe's own `check()`.
    """
    try:
        cwd = absolute(".", cwd or Path.cwd())
        file = absolute(path, cwd)
    except ValueError as error:
        raise ConfigError([Problem(str(path), "", str(error))]) from None
    reader = Reader(cwd)
    table: Node = reader.read(file)
    can_go_on = not reader.problems
    table = merge(table, _overrides(overrides, cwd, reader), reader.problems)
    if not can_go_on:
        raise ConfigError(reader.problems)
    assert isinstance(table, Table)

    beside = (*reader.folders, cwd) if own_code else ()
    folders = [*reader.import_paths, *(folder for folder in beside if folder not in reader.import_paths)]
    return resolve(
        table,
        folders,
        import_paths=reader.import_paths,
        default=Origin(DEFAULT, cwd),
        default_recipe=default_recipe,
        problems=reader.problems,
        extra_checks=extra_checks,
    )


def resolve(
    table: Table,
    folders: Sequence[Path],
    *,
    import_paths: Sequence[Path],
    default: Origin,
    default_recipe: str,
    problems: Sequence[Problem] = (),
    extra_checks: Checks | None = None,
) -> Config:
    """The configuration that a merged tree spells. `problems` are those that reading it had."""
    make_importable(folders)
    named = table.entries.get("recipe", Value(default_recipe, default))
    cls = _recipe_class(named, folders)
    decoder = Decoder(folders, default)
    recipe, root = decoder.recipe(cls, table.without("recipe"))
    _raise_if_any([*problems, *decoder.problems])
    assert recipe is not FAILED

    use = plain(named)
    homes = dict.fromkeys([*import_paths, *filter(None, [home_of(use, folders)]), *decoder.homes])
    entries: dict[str, Any] = {"recipe": Leaf(use, named.origin)}
    if homes:
        entries["import_paths"] = Leaf([str(home) for home in homes], default)
    config = Config(recipe, Branch({**entries, **root.entries}, root.origin))
    try:
        complaints = [
            *(recipe.check() if hasattr(recipe, "check") else ()),
            *(extra_checks(recipe) if extra_checks else ()),
        ]
    except (Exception, SystemExit) as error:  # of the recipe, or of a component that it asks
        complaints = [("recipe", f"its check() fails: {describe_error(error)}")]
    _raise_if_any([config.problem(at, message) for at, message in complaints])
    return config


def _overrides(overrides: Sequence[Override], cwd: Path, reader: Reader) -> Table:
    """The command line's layer."""
    layer = reader.take_import_paths(command_line(overrides, cwd, reader.problems))
    if "extends" in layer.entries:
        node = layer.entries["extends"]
        message = "only a file can extend others; write a file that extends them"
        reader.problems.append(Problem(node.origin.where, "extends", message, brief_value(plain(node))))
    return layer.without("extends")


def _recipe_class(named: Any, folders: Sequence[Path]) -> type:
    value = plain(named)
    try:
        if not isinstance(value, str):
            raise UseError('expected an import path, "package.module:Name"')
        return import_class(value, folders)
    except UseError as error:
        raise ConfigError([Problem(named.origin.where, "recipe", str(error), brief_value(value))]) from None


def _raise_if_any(problems: Sequence[Problem]) -> None:
    if problems:
        raise ConfigError(problems)
