"""A directory in the main memory of this machine: it outlives the processes of a run, but not their launcher."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from components.atomic_files import remove_files
from components.checkpoint.manifest import WRITTEN

HOST_MEMORY = "POWERTRAIN_HOST_MEMORY"
"""Environment variable of the workers: the directory of their launcher; empty or unset if there is none."""
_ROOT = Path("/dev/shm")
_PREFIX = "powertrain-"
_NEW_SECONDS = 60.0
"""Minimum age before an empty directory is removed: a younger one may not be locked yet."""


def host_memory_directory() -> Path | None:
    """Call in a worker: return the directory of its launcher, or None."""
    return Path(path) if (path := os.environ.get(HOST_MEMORY)) else None


@contextmanager
def make_host_memory_directory(root: Path = _ROOT) -> Iterator[None]:
    """Call in a launcher: make the directory and name it in the environment; it is removed at the end.

    Does nothing on a machine without `root`. The directory is locked while this process lives: if it is killed, the
    next call on the machine removes its directory, which would otherwise occupy memory until the machine restarts.
    """
    os.environ.pop(HOST_MEMORY, None)
    if not os.access(root, os.W_OK):
        yield
        return
    _remove_abandoned(root)
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        os.environ[HOST_MEMORY] = str(directory)
        yield
    finally:
        os.environ.pop(HOST_MEMORY, None)
        _remove(directory)
        os.close(handle)


def _remove_abandoned(root: Path) -> None:
    """Remove the directories of killed launchers of this user."""
    for directory in root.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # it belongs to another user, or has just been removed
            handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_new = time.time() - directory.stat().st_mtime < _NEW_SECONDS
                if any(directory.iterdir()) or not is_new:
                    _remove(directory)
            finally:
                os.close(handle)


def _remove(directory: Path) -> None:
    """Remove the copies in `directory`, and the directory unless it holds other files."""
    with suppress(OSError):
        for copy in directory.iterdir():
            if copy.is_dir() and not copy.is_symlink():
                remove_files(copy, WRITTEN.fullmatch)
        directory.rmdir()
