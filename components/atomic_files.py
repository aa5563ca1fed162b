"""Files and directories that are complete or not there, whenever the process, the machine or the disk fails.

The content of a file is on the disk after an fsync of the file, its name after an fsync of its directory. Imports
nothing of the project, so that every component may import it.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_ABANDONED_SECONDS = 60.0


def write_fsync(path: Path, content: str | bytes) -> None:
    """Write `content` and return when it is on the disk; the name of a new file needs `fsync_directory` too."""
    with path.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def atomic_write(path: Path, text: str) -> None:
    """Replace the content of `path` by `text`. Readers find all of it or the old one, whatever fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write_fsync(temporary, text)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def temporary_files_of(path: Path) -> list[Path]:
    """Return the temporary files of `path` that processes killed in `atomic_write` have left."""
    name = re.compile(rf"\.{re.escape(path.name)}\.\d+\.part")
    return [each for each in path.parent.iterdir() if name.fullmatch(each.name)] if path.parent.is_dir() else []


@contextmanager
def atomic_directory(directory: Path) -> Iterator[Path]:
    """Yield a temporary directory that is renamed to `directory` after the block, or removed if the block raises.

    The caller syncs the files it writes there. Several processes may write the same directory at once: the first to
    finish gives it its content, the others discard theirs, and the caller cannot tell which it was. The temporary
    directory is locked while it is written, so that one left by a killed process is recognized and removed.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    for leftover in directory.parent.glob(f".{directory.name}.*.part"):
        _remove_abandoned(leftover)
    temporary = _temporary_name(directory)
    lock = _lock_of(temporary)
    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with suppress(OSError):  # some network file systems cannot lock: then nothing is removed there
            fcntl.flock(handle, fcntl.LOCK_EX)
        temporary.mkdir()
        yield temporary
        fsync_directory(temporary)
        try:
            temporary.rename(directory)
        except OSError:
            if not directory.is_dir():
                raise
            # Another process finished first.
        fsync_directory(directory.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        lock.unlink(missing_ok=True)
        os.close(handle)


def remove_atomic(directory: Path, files: Collection[str]) -> None:
    """Remove `files` and their `directory` in one step for readers. Other files stay, in a directory of another name.

    Of a symbolic link only the link is removed.
    """
    temporary = _temporary_name(directory)
    with suppress(FileNotFoundError):  # another process did
        directory.rename(temporary)
    with suppress(OSError):
        remove_files(temporary, files.__contains__)


def remove_files(directory: Path, is_ours: Callable[[str], object]) -> bool:
    """Remove the files in `directory` whose name `is_ours` accepts, then the directory; return whether it is gone.

    The directory stays if it holds anything else. Links are removed and never followed: what they lead to stays.
    """
    if directory.is_symlink():
        directory.unlink()
        return True
    for entry in list(directory.iterdir()):
        if is_ours(entry.name) and (entry.is_symlink() or not entry.is_dir()):
            entry.unlink()
    if any(directory.iterdir()):
        return False
    directory.rmdir()
    return True


def fsync_file(path: Path) -> None:
    """Make what others wrote to `path` durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def fsync_directory(directory: Path) -> None:
    """Make the names in `directory` durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _temporary_name(directory: Path) -> Path:
    return directory.parent / f".{directory.name}.{uuid.uuid4().hex[:12]}.part"


def _lock_of(temporary: Path) -> Path:
    """Return the lock file beside `temporary`. NFS would not share the lock of a directory with other machines."""
    return temporary.with_name(f"{temporary.name}.lock")


def _remove_abandoned(leftover: Path) -> None:
    """Remove `leftover` unless its writer lives: the kernel drops a lock with the process that held it."""
    with suppress(OSError):
        if time.time() - leftover.stat().st_mtime < _ABANDONED_SECONDS:
            return  # may have been made a moment ago, and not be locked yet
        lock = _lock_of(leftover)
        handle = os.open(lock, os.O_RDWR)  # without its lock it is not known to be one of ours
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(leftover)
            lock.unlink()
        finally:
            os.close(handle)
