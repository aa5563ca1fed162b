"""Paths: file lookups raise an error for files and directories that cannot be accessed, instead of skipping them; and
the check of a file to write.

This module imports nothing of the project, so that every component may import it.
"""

from __future__ import annotations

import glob
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

_BLOCK_BYTES = 2**20
_SYSTEM = {"lost+found", "__MACOSX", "$RECYCLE.BIN", "System Volume Information", "@eaDir"}
"""Directories created by file systems, operating systems and archive tools."""


def expand_home(path: str | Path) -> Path:
    """Return `path` with a leading `~` or `~user` expanded. Raises ValueError if there is no such home directory."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{path}: there is no such home directory") from None


def is_file(path: Path) -> bool:
    """Return whether there is a regular file at `path`.

    Raises OSError if `path` cannot be accessed, and for a broken link, where `Path.is_file` returns False.
    """
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise FileNotFoundError(f"{path} is a link to {path.readlink()}, which does not exist") from None
        return False


def check_output_file(path: Path) -> None:
    """Raise OSError if `path` cannot be written, before the work whose result it is to hold. Creates nothing."""
    found = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; give the name of a file")
    if found != path.absolute() and not found.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {found} is not a directory")
    if not os.access(found, os.W_OK):
        raise PermissionError(f"{path} cannot be written: there is no permission to write {found}")


def hash_file(path: Path) -> str:
    """Return the SHA-256 of the content of `path` in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def walk_files(folder: Path, *, hidden: bool = False) -> Iterator[Path]:
    """Yield all files below `folder`, also in linked directories, each directory once even if links form a cycle.

    Names that start with a dot and system directories (`lost+found`, `__MACOSX`) are skipped unless `hidden`. Raises
    OSError for a directory that cannot be listed and for a broken link.
    """
    seen: set[tuple[int, int]] = set()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=raise_error):
        # sorted, so that the path of a directory with several links is deterministic
        folders[:] = sorted(name for name in folders if hidden or not _is_hidden(name))
        status = Path(place).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        for name in files:
            # hidden broken links are lock files of editors
            if not _is_hidden(name) or (hidden and Path(place, name).exists()):
                is_file(Path(place, name))
                yield Path(place, name)


def glob_files(pattern: str) -> list[Path]:
    """Return the files that match the glob `pattern`. Raises OSError as `walk_files` does, where `glob` skips them."""
    parts = Path(pattern).parts
    for number, part in enumerate(parts):
        if glob.has_magic(part):  # check all directories that match the pattern up to here
            above = str(Path(*parts[: number + (part == "**")]))
            for folder in map(Path, glob.glob(above, recursive=True)):  # noqa: PTH207
                if folder.is_dir() and folder.name not in _SYSTEM:
                    _check_listable(folder)
    found = map(Path, glob.glob(pattern, recursive=True))  # noqa: PTH207
    # `glob` skips hidden names, but not system directories
    return [path for path in found if (_SYSTEM & {*path.parts}) <= {*parts} and is_file(path)]


def raise_error(error: OSError) -> NoReturn:
    """Raise `error` for a directory that cannot be listed; as `onerror` of `os.walk`, which ignores it by default."""
    raise type(error)(f"{error.filename} cannot be listed: {error.strerror}") from None


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _SYSTEM


def _check_listable(folder: Path) -> None:
    try:
        os.scandir(folder).close()
    except OSError as error:
        raise_error(error)
