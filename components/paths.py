"""Files and folders as they are: what cannot be listed or reached is an error that names it, never an absent file.

Imports nothing of the project, so that every component may import it.
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
"""What file systems and archives put beside the files of a user."""


def is_file(path: Path) -> bool:
    """Return whether there is a regular file at `path`.

    Raises OSError where that cannot be seen, and for a link to nothing: `Path.is_file` says False to both.
    """
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise FileNotFoundError(f"{path} is a link to {path.readlink()}, which does not exist") from None
        return False


def hash_file(path: Path) -> str:
    """Return the SHA-256 of the content of `path` in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def walk_files(folder: Path, *, hidden: bool = False) -> Iterator[Path]:
    """Yield all files below `folder`, also in folders that are links; none twice, however the links lead.

    Names that begin with a dot, and what the system keeps (`lost+found`, `__MACOSX`), are left out unless `hidden`.
    Raises OSError for a folder that cannot be listed and for a link to nothing.
    """
    seen: set[tuple[int, int]] = set()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=raise_error):
        # sorted, so that of two ways to a folder it is always the same one
        folders[:] = sorted(name for name in folders if hidden or not _is_hidden(name))
        status = Path(place).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        for name in files:
            # a hidden link to nothing is how editors lock a file
            if not _is_hidden(name) or (hidden and Path(place, name).exists()):
                is_file(Path(place, name))
                yield Path(place, name)


def glob_files(pattern: str) -> list[Path]:
    """Return the files that match the glob `pattern`. Raises OSError as `walk_files`, where `glob` is silent."""
    parts = Path(pattern).parts
    for number, part in enumerate(parts):
        if glob.has_magic(part):  # all folders in which names are looked for: those of the parts so far
            above = str(Path(*parts[: number + (part == "**")]))
            for folder in map(Path, glob.glob(above, recursive=True)):  # noqa: PTH207
                if folder.is_dir() and folder.name not in _SYSTEM:
                    _check_listable(folder)
    found = map(Path, glob.glob(pattern, recursive=True))  # noqa: PTH207
    # `glob` leaves out hidden names, but knows nothing of the system's
    return [path for path in found if (_SYSTEM & {*path.parts}) <= {*parts} and is_file(path)]


def raise_error(error: OSError) -> NoReturn:
    """The `onerror` of `os.walk`, which leaves out without a word what it cannot list."""
    raise type(error)(f"{error.filename} cannot be listed: {error.strerror}") from None


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _SYSTEM


def _check_listable(folder: Path) -> None:
    try:
        os.scandir(folder).close()
    except OSError as error:
        raise_error(error)
