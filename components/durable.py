"""Writing so that a failure of the process, the machine or the disk leaves the old content or the new, never half.

A file is on the disk once it was synced; its name is, once its directory was. Imports nothing of the project, so that
every component may import it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path


def write_synced(path: Path, text: str) -> None:
    """Write `text`, and return when it is on the disk; the name is not, before `sync_directory`."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, text: str) -> None:
    """Give the file `path` the content `text`: whoever reads it, and whatever fails, finds all of it or the old one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write_synced(aside, text)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def unfinished(path: Path) -> list[Path]:
    """What processes that were killed in `replace_file` have left of `path`."""
    name = re.compile(rf"\.{re.escape(path.name)}\.\d+\.part")
    return [each for each in path.parent.iterdir() if name.fullmatch(each.name)] if path.parent.is_dir() else []


def remove_written(directory: Path, written: Callable[[str], object]) -> bool:
    """Remove the files in `directory` whose name `written` accepts, then the directory; returns whether it is gone.

    It stays if it holds anything else. Links are removed and never followed: what they lead to stays.
    """
    if directory.is_symlink():
        directory.unlink()
        return True
    for entry in list(directory.iterdir()):
        if written(entry.name) and (entry.is_symlink() or not entry.is_dir()):
            entry.unlink()
    if any(directory.iterdir()):
        return False
    directory.rmdir()
    return True


def sync_file(path: Path) -> None:
    """Make what others wrote to `path` durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Make the names in `directory` durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
