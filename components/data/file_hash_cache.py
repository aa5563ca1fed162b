"""A cache of the SHA-256 of files, so that an unchanged file is hashed only once."""

from __future__ import annotations

import json
import math
import time
from contextlib import suppress
from pathlib import Path

from components.atomic_files import atomic_write
from components.json_files import read_object
from components.paths import hash_file

HASH_CACHE_FILE = "file-hashes.json"
"""Name of the file in a cache directory."""
_SETTLED_NANOSECONDS = 2 * 10**9
"""A file modified more recently may change again without a new timestamp; its hash is not stored."""


class FileHashCache:
    """SHA-256 of files. A hash is valid as long as size, modification time and change time of the file are the same.

    Use it as a context manager: new hashes are written to `path` at the end, unless `path` cannot be written or is a
    file of another kind.
    """

    def __init__(self, path: Path):
        self._path = path
        self._known, self._may_replace = _read_hashes(path)
        self._changed = False

    def sha256(self, path: Path) -> str:
        signature = stat_signature(path)
        key = str(path.absolute())
        known = self._known.get(key)
        if known is not None and known[:3] == signature:
            return str(known[3])
        started = time.time_ns()
        digest = hash_file(path)
        if started - max(signature[1:]) > _SETTLED_NANOSECONDS:
            self._known[key] = [*signature, digest]
            self._changed = True
        return digest

    def __enter__(self) -> FileHashCache:
        return self

    def __exit__(self, *error: object) -> None:
        if self._changed and self._may_replace:
            with suppress(OSError):  # only a cache: on a full or read-only disk, files are hashed again next time
                self._path.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(self._path, json.dumps(self._known))


def stat_signature(path: Path) -> list[int]:
    """Return size, modification time and change time of a file, which change when its content does."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _read_hashes(path: Path) -> tuple[dict[str, list[int | str]], bool]:
    """Return the stored hashes, and whether the file may be replaced: it does not exist, or holds only hashes."""
    try:
        known = read_object(path, math.inf)
    except FileNotFoundError:
        return {}, True
    except (OSError, ValueError):
        return {}, False
    found = {key: value for key, value in known.items() if isinstance(value, list) and len(value) == 4}
    return found, len(found) == len(known)
