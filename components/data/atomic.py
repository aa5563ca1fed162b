"""A directory that is complete or not there, whenever the process, the machine or the disk fails."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from components.durable import remove_written

_ABANDONED_SECONDS = 60.0


@contextmanager
def written_aside(directory: Path) -> Iterator[Path]:
    """A new directory beside `directory` that takes its name once the block has ended well, and is gone otherwise.

    `directory` appears complete, synced file by file by the caller, or not at all. Several processes may write it at
    once: the first to finish gives it its content, the others discard theirs, and the caller cannot tell which it was.
    While it is being written it is locked, so that what a killed process left can be told apart and swept away.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    for leftover in directory.parent.glob(f".{directory.name}.*.part"):
        _sweep(leftover)
    aside = directory.parent / f".{directory.name}.{uuid.uuid4().hex[:12]}.part"
    lock = _lock_of(aside)
    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with suppress(OSError):  # some network file systems cannot lock: then nothing is swept there
            fcntl.flock(handle, fcntl.LOCK_EX)
        aside.mkdir()
        yield aside
        _sync_directory(aside)
        try:
            aside.rename(directory)
        except OSError:
            if not directory.is_dir():
                raise
            # Another process finished first.
        _sync_directory(directory.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        lock.unlink(missing_ok=True)
        os.close(handle)


def _lock_of(aside: Path) -> Path:
    """A file beside it: the lock of a directory NFS would keep to this machine."""
    return aside.with_name(f"{aside.name}.lock")


def discard(directory: Path, files: Collection[str]) -> None:
    """Remove `files` with their `directory`, all of it at once for whoever looks. Other files stay, under its new name.

    Of a link only the link is removed.
    """
    aside = directory.parent / f".{directory.name}.{uuid.uuid4().hex[:12]}.part"
    with suppress(FileNotFoundError):  # another process did
        directory.rename(aside)
    with suppress(OSError):
        remove_written(aside, files.__contains__)


def _sweep(leftover: Path) -> None:
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


def sync_file(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
