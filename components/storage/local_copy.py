"""`fetch`: bring the local copy of an address up to date before it is read."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from components.atomic_files import atomic_write
from components.errors import InputError, MissingFileError
from components.json_files import read_object
from components.paths import is_file
from components.storage.address import RemoteDirectory, StorageError, address_of, local_copies

log = logging.getLogger("powertrain")


def fetch(path: Path, *, missing_ok: bool = False) -> None:
    """Bring the file, the directory or the matches of the glob pattern at `path` up to date, if it is a local copy.

    Files whose size and version are those of the last time are not read again, and files that are gone are removed.
    One process of each machine fetches at a time; a process fetches each path once. Raises StorageError if the storage
    cannot be reached and there is no copy, FileNotFoundError if there is nothing at the address.
    """
    address = address_of(path)
    if address is None:
        return
    try:
        _fetch_once(address, path)
    except FileNotFoundError:
        if not missing_ok:
            raise


def fetch_file(path: Path, key: str = "path") -> None:
    """Fetch `path`, a single file. Raises InputError at `key` if it is missing or cannot be accessed."""
    try:
        fetch(path)
        exists = is_file(path)
    except OSError as error:
        raise InputError.below(key, error) from None
    if not exists:
        raise MissingFileError(key, f"{path} does not exist")


@cache
def _fetch_once(address: str, path: Path) -> None:
    folder, pattern = address, ""
    if glob.has_magic(address):
        parts = address.split("/")
        number = next(number for number, part in enumerate(parts) if glob.has_magic(part))
        folder, pattern = "/".join(parts[:number]), "/".join(parts[number:])
    for _ in pattern.split("/") if pattern else ():
        path = path.parent
    record_file = _record_of(address)
    with _lock(record_file.with_suffix(".lock")):
        known = _read_record(record_file)
        remote = RemoteDirectory(folder)
        try:
            if not pattern and remote.is_file():
                remote, path, pattern = RemoteDirectory(folder.rpartition("/")[0]), path.parent, path.name
            found = remote.list_files(pattern)
        except StorageError as error:
            if not known:
                raise
            log.warning(f"{error}; using the copy of {path} from an earlier run")
            return
        if not found:
            raise FileNotFoundError(f"there is no file at {address}")
        _copy(remote, path, found, known, record_file)


def _copy(
    remote: RemoteDirectory, folder: Path, found: dict[str, tuple[int, str]], known: dict[str, Any], record_file: Path
) -> None:
    """Copy the files of `found` that differ from `known`, and record them once all are there."""

    def is_current(name: str) -> bool:
        target = folder / name
        return known.get(name) == [*found[name]] and target.is_file() and target.stat().st_size == found[name][0]

    missing = [name for name in found if not is_current(name)]
    if missing:
        size = sum(found[name][0] for name in missing)
        log.info(f"fetching {len(missing)} files, {size:,} bytes, from {remote}")
    for name in missing:
        remote.download_file(name, folder / name, size=found[name][0])
    for name in known.keys() - found.keys():
        (folder / name).unlink(missing_ok=True)
    atomic_write(record_file, json.dumps(found))


def _record_of(address: str) -> Path:
    folder = local_copies() / ".records"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{hashlib.sha256(address.encode()).hexdigest()[:24]}.json"


def _read_record(record_file: Path) -> dict[str, Any]:
    """Return name -> [bytes, version] of the last time; empty if there was none, or the record is damaged.

    Files that are not at the address any more are removed, so every name must be that of a file in the copy.
    """
    try:
        record = read_object(record_file, math.inf)
    except (OSError, ValueError):
        return {}
    return record if all(map(_is_below, record)) else {}


def _is_below(name: str) -> bool:
    """Return whether `name` is a path to a file below the directory that it is relative to."""
    try:
        return b"\0" not in os.fsencode(name) and not name.startswith("/") and ".." not in name.split("/")
    except UnicodeEncodeError:
        return False


@contextmanager
def _lock(file: Path) -> Iterator[None]:
    """Let one process of this machine at a time into the block; others wait. The kernel frees it with the process."""
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
