"""Reading the JSON files of a model, and writing a directory atomically."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.atomic_files import atomic_directory, remove_files, write_fsync
from components.json_files import read_object
from components.paths import expand_home, is_file

MARK = "powertrain.json"
"""Lists the files that were written to a directory: `new_directory` replaces only those."""
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`. Raises FileNotFoundError, or ValueError if it is not a JSON object."""
    if not is_file(path):
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return read_object(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_fsync(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_index(path: Path) -> dict[str, Path]:
    """Return tensor name -> file of an index. Raises ValueError for a file outside the directory of the index."""
    table = read_json(path).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise ValueError(f"{path} has no weight_map")
    for name, file in table.items():
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
            raise ValueError(f"{path}: the file of {name} is {file!r}, which is not a file name in this directory")
    return {name: path.parent / file for name, file in table.items()}


def choose_files(whole: Path, index: Path) -> tuple[dict[str, Path] | None, list[str]]:
    """Return tensor name -> file of `index`, or None for the single file `whole`, and warnings if both exist.

    As in transformers, `whole` has precedence: an index beside it remains from an earlier save. Raises
    FileNotFoundError if neither exists.
    """
    if is_file(whole):
        note = f"both {whole} and {index.name} exist, and only the first is read; remove one of them"
        return None, [note] if is_file(index) else []
    if is_file(index):
        return read_index(index), []
    raise FileNotFoundError(f"{whole.parent} has neither {whole.name} nor {index.name}")


@contextmanager
def new_directory(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary directory that is renamed to `path` after the block, or removed if the block raises.

    `path` must not exist, or be an empty directory. With `force` it may also be a directory that this function wrote,
    without other files; it is replaced. Raises ValueError otherwise, before the block.
    """
    path = expand_home(path).resolve()
    _check_free(path, force)
    replaced = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.replaced")
    with atomic_directory(path) as temporary:
        yield temporary
        files = [MARK, *sorted(entry.name for entry in temporary.iterdir())]
        write_json(temporary / MARK, {"files": files})
        written = _check_free(path, force)  # checked again: writing may have taken an hour
        if path.exists():
            path.rename(replaced)
    if replaced.exists():
        remove_files(replaced, written.__contains__)


def _check_free(path: Path, force: bool) -> set[str]:
    """Return the names of the files at `path` of an earlier call. Raises ValueError if there are others."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is not a directory; use another path")
    content = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    if not content:
        return set()
    if not force:
        raise ValueError(f"{path} is not empty; use another directory, or replace it with --force")
    files = read_json(path / MARK).get("files") if MARK in content else None
    written = {name for name in files if isinstance(name, str)} if isinstance(files, list) else set()
    if foreign := sorted(content - written):
        raise ValueError(
            f"{path} holds {foreign[0]}, which is not listed in {MARK}, and --force removes only files of an earlier "
            "export; use another directory, or move the file away"
        )
    return written
