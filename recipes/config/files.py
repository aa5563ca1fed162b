"""Reading recipe files: text to tree, following `extends`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import tomli

from recipes.config.lines import KeyPath, line_index
from recipes.config.problems import ConfigError, Origin, Problem, absolute, closest, shown
from recipes.config.toml import brief_value
from recipes.config.tree import Node, Table, graft, merge, plain


class Reader:
    """Reads a recipe and the files below it; `problems` gathers what could not be read."""

    def __init__(self, cwd: Path) -> None:
        self.cwd = cwd
        self.problems: list[Problem] = []
        self.folders: list[Path] = []
        """Where the files lie: a recipe's own modules may lie beside it."""
        self.import_paths: list[Path] = []
        """What the files list under `import_paths`."""

    def read(self, path: Path) -> Table:
        """The recipe at `path`, an absolute one, merged over everything it extends."""
        return self._read(path, (), Problem(shown(path, self.cwd), "", ""))

    def take_import_paths(self, table: Table) -> Table:
        """`table` without its `import_paths`, which come to stand, absolute, in `self.import_paths`."""
        for folder, named in self._paths(table, "import_paths"):
            if not folder.is_dir():
                self.problems.append(replace(named, message=f"no such directory: {shown(folder, self.cwd)}"))
            elif folder not in self.import_paths:
                self.import_paths.append(folder)
        return table.without("import_paths")

    def _read(self, file: Path, chain: tuple[Path, ...], named: Problem) -> Table:
        """`chain` holds the files being read, outermost first; `named` heads a problem with the naming of this one."""
        if file in chain:
            cycle = " -> ".join(shown(link, self.cwd) for link in (*chain[chain.index(file) :], file))
            self.problems.append(replace(named, message=f"files extend each other in a circle: {cycle}"))
            return Table({}, Origin(named.where, file.parent))
        if file.parent not in self.folders:
            self.folders.append(file.parent)
        try:
            own = self._parse(file, named)
        except ConfigError as error:
            self.problems += error.problems
            return Table({}, Origin(named.where, file.parent))
        layers: Iterable[Node] = [
            *(self._read(base, (*chain, file), head) for base, head in self._paths(own, "extends")),
            self.take_import_paths(own.without("extends")),
        ]
        below: Node = Table({}, own.origin)
        for layer in layers:
            below = merge(below, layer, self.problems)
        assert isinstance(below, Table)
        return below

    def _parse(self, file: Path, named: Problem) -> Table:
        name = shown(file, self.cwd)
        text = self._text(file, named)
        try:
            document = tomli.loads(text)
        except tomli.TOMLDecodeError as error:
            raise ConfigError([_syntax_problem(name, text, str(error))]) from None
        except RecursionError:
            raise ConfigError([Problem(name, "", "nested too deeply to read")]) from None
        lines = line_index(text)

        def origin(path: KeyPath) -> Origin:
            return Origin(f"{name}:{lines[path]}" if path else name, file.parent)

        table = graft(document, origin)
        assert isinstance(table, Table)
        return table

    def _text(self, file: Path, named: Problem) -> str:
        try:
            return file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            message = f"not UTF-8 text: byte 0x{error.object[error.start]:02x}; save the file as UTF-8"
            raise ConfigError([Problem(f"{shown(file, self.cwd)}:{line}", "", message)]) from None
        except IsADirectoryError:
            message = "a directory, not a recipe file"
        except FileNotFoundError:
            message = "no such file" + _similar_file(file, self.cwd)
        except OSError as error:
            message = f"cannot be read: {error.strerror}"
        if named.path:  # named by another file, so the reader must learn which one is meant
            message = f"{shown(file, self.cwd)}: {message}"
        raise ConfigError([replace(named, message=message)])

    def _paths(self, table: Table, key: str) -> list[tuple[Path, Problem]]:
        """The paths that a top-level list names, each with the head of a problem about it."""
        node = table.entries.get(key)
        if node is None:
            return []
        value = plain(node)
        head = Problem(node.origin.where, key, "", brief_value(value))
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.problems.append(replace(head, message=f'expected a list of paths, such as {key} = ["base/cpu.toml"]'))
            return []
        try:
            return [(absolute(item, node.origin.folder), head) for item in value]
        except ValueError as error:
            self.problems.append(replace(head, message=str(error)))
            return []


def _similar_file(file: Path, cwd: Path) -> str:
    if not file.parent.is_dir():
        return f": there is no directory {shown(file.parent, cwd)}"
    try:
        entries = list(file.parent.iterdir())
    except OSError as error:
        return f": {shown(file.parent, cwd)} cannot be listed ({error.strerror})"
    names = [entry.name for entry in entries if entry.suffix == ".toml" or entry.name == file.stem]
    match = closest(file.name, names, cutoff=0.6) or closest(f"{file.name}.toml", names, cutoff=0.8)
    return f"; did you mean {shown(file.parent / match, cwd)}?" if match else ""


def _syntax_problem(name: str, text: str, error: str) -> Problem:
    """tomli says where in words: `Expected '=' after a key (at line 3, column 7)`, or `(at end of document)`."""
    what, _, place = error.rpartition(" (at ")
    position = re.match(r"line (\d+), column (\d+)", place)
    lines = text.split("\n")
    line, column = (int(position[1]), int(position[2])) if position else (len(lines), len(lines[-1]) + 1)
    if line > 1 and not lines[line - 1].strip():  # an unfinished value is noticed only on the line after it
        line = next((number for number in range(line, 0, -1) if lines[number - 1].strip()), line)
        column = len(lines[line - 1]) + 1
    message = f"not valid TOML: {what or error}"
    if what.startswith(("Cannot overwrite", "Cannot declare", "Cannot mutate")):
        message += "; this key was given before"
    return Problem(f"{name}:{line}:{column}", "", f"{message}\n  {lines[line - 1].rstrip()}\n  {' ' * (column - 1)}^")
