"""Atomic writing: files and directories are complete or do not exist, even if the process, machine or disk fails.

The content of a file is on the disk after an fsync of the file, its name after an fsync of its directory. This module
imports nothing of the project, so that every component may import it.
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
    """Write `content` and return when it is on the disk; a new file also needs `fsync_directory` for its name."""
    with path.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def atomic_write(path: Path, text: str) -> None:
    """Replace the content of `path` by `text`. Readers see the old or the new content, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write_fsync(temporary, text)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def temporary_files_of(path: Path) -> list[Path]:
    """Return the temporary files that processes killed in `atomic_write(path, ...)` have left."""
    name = re.compile(rf"\.{re.escape(path.name)}\.\d+\.part")
    return [each for each in path.parent.iterdir() if name.fullmatch(each.name)] if path.parent.is_dir() else []


@contextmanager
def atomic_directory(directory: Path) -> Iterator[Path]:
    """Yield a temporary directory that is renamed to `directory` after the block, or removed if the block raises.

    The caller must fsync the files it writes there. Several processes may write the same directory at once: the content
    of the first to finish is kept, that of the others is discarded silently. The temporary directory is locked while it
    is written, so that one of a killed process can be recognized and removed. Checkpoints, which all ranks write, do
    not use it: see components/checkpoint/commit.py.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    for leftover in directory.parent.glob(f".{directory.name}.*.part"):
        _remove_abandoned(leftover)
    temporary = _temporary_name(directory)
    lock = _lock_of(temporary)
    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with suppress(OSError):  # without locks, as on some network file systems, leftovers are never removed
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
    """Remove `files` and their `directory`, atomically for readers. Other files are kept, in a renamed directory.

    Of a symbolic link, only the link is removed.
    """
    temporary = _temporary_name(directory)
    with suppress(FileNotFoundError):  # another process has removed it
        directory.rename(temporary)
    with suppress(OSError):
        remove_files(temporary, files.__contains__)


def remove_files(directory: Path, is_ours: Callable[[str], object]) -> bool:
    """Remove the files in `directory` whose name `is_ours` accepts; return whether the directory could be removed too.

    The directory is kept if it contains other files. Links are removed, not followed.
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
    """Flush the content of `path` to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def fsync_directory(directory: Path) -> None:
    """Flush the file names in `directory` to the disk."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _temporary_name(directory: Path) -> Path:
    return directory.parent / f".{directory.name}.{uuid.uuid4().hex[:12]}.part"


def _lock_of(temporary: Path) -> Path:
    """Return the lock file of `temporary`. On NFS, the lock of a directory would only hold on this machine."""
    return temporary.with_name(f"{temporary.name}.lock")


def _remove_abandoned(leftover: Path) -> None:
    """Remove `leftover` unless its writer is alive: the kernel releases the lock of a dead process."""
    with suppress(OSError):
        if time.time() - leftover.stat().st_mtime < _ABANDONED_SECONDS:
            return  # it may be new, and not locked yet
        lock = _lock_of(leftover)
        handle = os.open(lock, os.O_RDWR)  # raises without a lock file: another program may have written it
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(leftover)
            lock.unlink()
        finally:
            os.close(handle)
