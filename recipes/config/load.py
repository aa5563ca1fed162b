"""Load a recipe: read its files, merge them with the overrides, build the components, and check, in this order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tomli

from recipes.config.build import FAILED, ComponentBuilder
from recipes.config.errors import (
    DEFAULT,
    ConfigError,
    Origin,
    Problem,
    absolute,
    did_you_mean,
    display_path,
    error_with_location,
)
from recipes.config.imports import UseError, import_class, import_root, make_importable
from recipes.config.schema import fields_of
from recipes.config.toml import KeyPath, brief_value, join_key, line_index, split_key
from recipes.config.tree import (
    Leaf,
    Node,
    Override,
    Table,
    components,
    dump,
    from_toml,
    leaves,
    merge,
    problem_at,
    read_command_line,
    to_python,
    written,
)


@dataclass(frozen=True)
class Config:
    """A complete and valid configuration."""

    recipe: Any
    """The recipe object with its components."""
    root: Table
    """All keys with their typed values."""

    @property
    def leaves(self) -> Mapping[str, Leaf]:
        """Dotted path -> value and origin, in the order of the dump."""
        return MappingProxyType(dict(leaves(self.root)))

    def components(self) -> Iterator[tuple[str, Any]]:
        """Yield (dotted path, object) of every component of the recipe, except the recipe itself."""
        return ((join_key(path), component) for path, component in components(self.recipe, self.root) if path)

    def to_toml(self, provenance: bool = True) -> str:
        """Return a complete recipe in TOML, defaults included; `provenance` adds where each value comes from.

        Loading it gives the same configuration, from any directory.
        """
        return dump(self.root, provenance)

    def holds(self, path: str) -> bool:
        """Return whether `path` is a key or table of this configuration."""
        return any(f"{leaf}.".startswith(f"{path}.") for leaf in self.leaves)

    def problem(self, path: str, message: str) -> Problem:
        """Return a problem with the key or table at `path`, with the place where it was written."""
        return problem_at(self.root, split_key(path) if path else (), message)


def load(
    path: Path,
    overrides: Sequence[Override] = (),
    *,
    cwd: Path | None = None,
    default_recipe: str = "recipes.pretrain:Pretrain",
    own_code: bool = True,
) -> Config:
    """Return the configuration in the file at `path`, under `overrides`. Raises ConfigError with all that is wrong.

    Paths on the command line and in defaults are relative to `cwd`; those in a file, to the directory of the file.
    Custom modules are searched for next to the file and in `cwd`, unless `own_code` is false.
    """
    try:
        cwd = absolute(".", cwd or Path.cwd())
        file = absolute(path, cwd)
    except ValueError as error:
        raise ConfigError([Problem(str(path), "", str(error))]) from None
    reader = RecipeReader(cwd)
    table: Node = reader.read(file)
    is_readable = not reader.problems
    table = merge(table, reader.read_overrides(overrides), reader.problems)
    if not is_readable:
        raise ConfigError(reader.problems)
    assert isinstance(table, Table)
    folders = list(dict.fromkeys([*reader.import_paths, *((*reader.folders, cwd) if own_code else ())]))
    return _build(table, folders, reader.import_paths, Origin(DEFAULT, cwd), default_recipe, reader.problems)


def derive(config: Config, recipe: str, changes: Mapping[str, Any], *, why: str) -> Config:
    """Return `config` as a configuration of `recipe`, with `changes` as the last layer and components built again.

    Sections that `recipe` does not have are dropped. Origins of values are kept; `why` is the origin of the changes.
    """
    stored = config.leaves.get("import_paths")
    import_paths = [Path(folder) for folder in stored.value] if stored else []
    known = {"recipe", *fields_of(import_class(recipe, import_paths))}
    table = written(config.root)
    assert isinstance(table, Table)
    table = table.without(*(key for key in table.entries if key not in known))
    merged = merge(table, from_toml({"recipe": recipe, **changes}, lambda _: Origin(why, Path.cwd())), [])
    assert isinstance(merged, Table)
    return _build(merged, import_paths, import_paths, Origin(DEFAULT, Path.cwd()), recipe, [])


def _build(
    table: Table,
    folders: Sequence[Path],
    import_paths: Sequence[Path],
    default: Origin,
    default_recipe: str,
    problems: Sequence[Problem],
) -> Config:
    """Build and check the configuration of a merged tree. `problems` are those found while reading it."""
    make_importable(folders)
    named = table.entries.get("recipe", Leaf(default_recipe, default))
    use = to_python(named)
    try:
        if not isinstance(use, str):
            raise UseError('expected an import path, "package.module:Name"')
        cls = import_class(use, folders)
    except UseError as error:
        raise ConfigError([Problem(named.origin.source, "recipe", str(error), brief_value(use))]) from None
    builder = ComponentBuilder(folders, default)
    recipe, root = builder.build_recipe(cls, table.without("recipe"))
    if problems or builder.problems:
        raise ConfigError([*problems, *builder.problems])
    assert recipe is not FAILED

    roots = dict.fromkeys([*import_paths, *filter(None, [import_root(use, folders)]), *builder.import_roots])
    entries: dict[str, Node] = {"recipe": Leaf(use, named.origin)}
    if roots:
        entries["import_paths"] = Leaf([str(root) for root in roots], default)
    config = Config(recipe, Table({**entries, **root.entries}, root.origin))
    _check(config)
    return config


def _check(config: Config) -> None:
    """Raise ConfigError with the problems that the `check()` of the recipe yields, as (dotted path, message)."""
    try:
        mistakes = list(config.recipe.check()) if hasattr(config.recipe, "check") else []
    except (Exception, SystemExit) as error:  # a bug in the recipe or in a component that it calls
        mistakes = [("recipe", f"its check() fails: {error_with_location(error)}")]
    if mistakes:
        raise ConfigError([config.problem(path, message) for path, message in mistakes])


class RecipeReader:
    """Reads a recipe and the files that it extends; `problems` collects what could not be read."""

    def __init__(self, cwd: Path) -> None:
        self.cwd = cwd
        self.problems: list[Problem] = []
        self.folders: list[Path] = []
        """The directories of the files, where custom modules may be."""
        self.import_paths: list[Path] = []
        """The directories that the files list under `import_paths`."""

    def read(self, path: Path) -> Table:
        """Return the recipe at the absolute `path`, merged over everything that it extends."""
        return self._read(path, (), Problem(display_path(path, self.cwd), "", ""))

    def read_overrides(self, overrides: Sequence[Override]) -> Table:
        """Return the layer of the command line."""
        layer = self._take_import_paths(read_command_line(overrides, self.cwd, self.problems))
        if "extends" in layer.entries:
            node = layer.entries["extends"]
            message = "only valid in a file; write a recipe that extends the others"
            self.problems.append(Problem(node.origin.source, "extends", message, brief_value(to_python(node))))
        return layer.without("extends")

    def _read(self, file: Path, chain: tuple[Path, ...], named: Problem) -> Table:
        """Read `file`. `chain`: the files being read, outermost first; `named`: a problem at its name."""
        nothing = Table({}, Origin(named.source, file.parent))
        if file in chain:
            cycle = " -> ".join(display_path(link, self.cwd) for link in (*chain[chain.index(file) :], file))
            self.problems.append(replace(named, message=f"files extend each other in a circle: {cycle}"))
            return nothing
        if file.parent not in self.folders:
            self.folders.append(file.parent)
        try:
            table = self._parse(file, named)
        except ConfigError as error:
            self.problems += error.problems
            return nothing
        merged: Node = Table({}, table.origin)
        for base, head in self._paths(table, "extends"):
            merged = merge(merged, self._read(base, (*chain, file), head), self.problems)
        merged = merge(merged, self._take_import_paths(table.without("extends")), self.problems)
        assert isinstance(merged, Table)
        return merged

    def _parse(self, file: Path, named: Problem) -> Table:
        name = display_path(file, self.cwd)
        text = self._text(file, named)
        try:
            document = tomli.loads(text)
        except tomli.TOMLDecodeError as error:
            raise ConfigError([_syntax_problem(name, text, error)]) from None
        except RecursionError:
            raise ConfigError([Problem(name, "", "nested too deeply to read")]) from None
        except ValueError:  # Python does not convert longer ones
            raise ConfigError([Problem(name, "", "an integer has more than 4,300 digits")]) from None
        lines = line_index(text)

        def origin(path: KeyPath) -> Origin:
            return Origin(f"{name}:{lines[path]}" if path else name, file.parent)

        table = from_toml(document, origin)
        assert isinstance(table, Table)
        return table

    def _text(self, file: Path, named: Problem) -> str:
        name = display_path(file, self.cwd)
        try:
            return file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            message = f"not UTF-8 text: byte 0x{error.object[error.start]:02x}; save the file as UTF-8"
            raise ConfigError([Problem(f"{name}:{line}", "", message)]) from None
        except IsADirectoryError:
            message = "a directory, not a recipe file"
        except FileNotFoundError:
            message = "no such file" + _suggest_file(file, self.cwd)
        except OSError as error:
            message = f"cannot be read: {error.strerror}"
        # a file that another one names is reported with both names
        raise ConfigError([replace(named, message=f"{name}: {message}" if named.path else message)])

    def _take_import_paths(self, table: Table) -> Table:
        """Return `table` without its `import_paths`, which are added, absolute, to `self.import_paths`."""
        for folder, head in self._paths(table, "import_paths"):
            if not folder.is_dir():
                self.problems.append(replace(head, message=f"no such directory: {display_path(folder, self.cwd)}"))
            elif folder not in self.import_paths:
                self.import_paths.append(folder)
        return table.without("import_paths")

    def _paths(self, table: Table, key: str) -> list[tuple[Path, Problem]]:
        """Return the paths in a top-level list, each with a problem about it that lacks its message."""
        node = table.entries.get(key)
        if node is None:
            return []
        value = to_python(node)
        head = Problem(node.origin.source, key, "", brief_value(value))
        try:
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                raise ValueError(f'expected a list of paths, such as {key} = ["base/cpu.toml"]')
            return [(absolute(item, node.origin.base_dir), head) for item in value]
        except ValueError as error:
            self.problems.append(replace(head, message=str(error)))
            return []


def _suggest_file(file: Path, cwd: Path) -> str:
    """Return the hint that follows "no such file"."""
    if not file.parent.is_dir():
        return f": there is no directory {display_path(file.parent, cwd)}"
    try:
        entries = list(file.parent.iterdir())
    except OSError as error:
        return f": {display_path(file.parent, cwd)} cannot be listed ({error.strerror})"
    names = [entry.name for entry in entries if entry.suffix == ".toml" or entry.name == file.stem]
    match = did_you_mean(file.name, names, cutoff=0.6) or did_you_mean(f"{file.name}.toml", names, cutoff=0.8)
    return f"; did you mean {display_path(file.parent / match, cwd)}?" if match else ""


def _syntax_problem(name: str, text: str, error: tomli.TOMLDecodeError) -> Problem:
    """Return the problem for a syntax error: its line of text, with a mark below the column."""
    lines = text.split("\n")
    line, column = error.lineno, error.colno
    if line > 1 and not lines[line - 1].strip():  # an unfinished value is noticed only on the line after it
        line = next((number for number in range(line, 0, -1) if lines[number - 1].strip()), line)
        column = len(lines[line - 1]) + 1
    message = f"not valid TOML: {error.msg}"
    if error.msg.startswith(("Cannot overwrite", "Cannot declare", "Cannot mutate")):
        message += "; this key was given before"
    return Problem(f"{name}:{line}:{column}", "", f"{message}\n  {lines[line - 1].rstrip()}\n  {' ' * (column - 1)}^")
