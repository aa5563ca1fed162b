"""A directory of small JSON files and large ones: read within bounds, written aside and renamed."""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.atomic_files import fsync_directory, remove_files, write_fsync
from components.paths import is_file
from components.units import expand_home

MARK = "powertrain.json"
"""Lists the files that were written to a directory: only those are replaced later."""
_LARGEST_JSON = 2**26
"""Bytes. The index of a model of a hundred thousand tensors takes a tenth of it."""
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def read_json(path: Path) -> dict[str, Any]:
    """The object in the file. Raises ValueError for anything else, FileNotFoundError if there is no such file."""
    if not is_file(path):
        raise FileNotFoundError(f"{path} does not exist")
    if (size := path.stat().st_size) > _LARGEST_JSON:
        raise ValueError(f"{path} has {size:,} bytes; at most {_LARGEST_JSON:,} are read")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_fsync(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_index(path: Path) -> dict[str, Path]:
    """Tensor name -> file, of an index beside its files. Raises ValueError for a name that leads elsewhere."""
    table = read_json(path).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise ValueError(f"{path} has no weight_map")
    for name, file in table.items():
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
            raise ValueError(f"{path}: {name} is said to be in {file!r}, which is no name of a file in this directory")
    return {name: path.parent / file for name, file in table.items()}


def choose_files(whole: Path, index: Path) -> tuple[dict[str, Path] | None, list[str]]:
    """Return tensor name -> file of an index, None for the one file `whole`, and what is contradictory about the two.

    As in transformers the whole file comes first: an index beside it is what an earlier save has left. Raises
    FileNotFoundError where there is neither.
    """
    if is_file(whole):
        note = f"{whole} is read, and {index.name} beside it, with the files it names, is not; remove one of the two"
        return None, [note] if is_file(index) else []
    if is_file(index):
        return read_index(index), []
    raise FileNotFoundError(f"{whole.parent} has neither {whole.name} nor {index.name}")


@contextmanager
def new_directory(path: Path, *, force: bool = False) -> Iterator[Path]:
    """A directory beside `path` that takes its name once the block ends well, and is gone otherwise.

    What is at `path` must be an empty directory. With `force` it may also be an earlier one of this function, which is
    then replaced, if nothing was added to it. Raises ValueError for all else, before the block.
    """
    path = expand_home(path).resolve()
    _check_free(path, force)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")
    aside.mkdir()
    try:
        yield aside
        files = [MARK, *sorted(entry.name for entry in aside.iterdir())]
        write_json(aside / MARK, {"files": files})
        fsync_directory(aside)
        written = _check_free(path, force)  # writing may have taken an hour
        replaced = path.with_name(f"{aside.name}.replaced")
        if path.exists():
            path.rename(replaced)
        aside.rename(path)
        fsync_directory(path.parent)
        if replaced.exists():
            remove_files(replaced, written.__contains__)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _check_free(path: Path, force: bool) -> set[str]:
    """Names of the files at `path` that an earlier call wrote. Raises ValueError where others are in the way."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is no directory; name another")
    content = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    if not content:
        return set()
    if not force:
        raise ValueError(f"{path} is not empty; name another directory, or replace this one with --force")
    files = read_json(path / MARK).get("files") if MARK in content else None
    written = {name for name in files if isinstance(name, str)} if isinstance(files, list) else set()
    if foreign := sorted(content - written):
        raise ValueError(
            f"{path} holds {foreign[0]}, which no export wrote according to {MARK}, and --force removes only what one "
            "wrote; name another directory, or move it away"
        )
    return written
