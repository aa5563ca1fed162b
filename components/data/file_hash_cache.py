"""What is in a file: SHA-256, remembered, so that a file that did not change is read once in its life."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path

from components.atomic_files import atomic_write
from components.paths import hash_file

MEMORY = "file-hashes.json"
"""Name of the file in a cache directory."""
_SETTLED_SECONDS = 2.0
"""A file younger than this may change again without its times showing it; such a hash is not remembered."""


class FileHashCache:
    """SHA-256 of files. A hash holds as long as size, modification and change time of the file stay as they were.

    Use as a context manager: what was learnt is written to `memory` at the end, if that can be written at all and is
    not a file of another kind.
    """

    def __init__(self, memory: Path):
        self._memory = memory
        self._known, self._is_mine = _read_memory(memory)
        self._learnt = False

    def sha256(self, path: Path) -> str:
        """Hex digest of the content of `path`."""
        status = path.stat()
        stamp = _stamp(status)
        key = str(path.absolute())
        known = self._known.get(key)
        if known is not None and known[:3] == stamp:
            return str(known[3])
        started = time.time()
        digest = hash_file(path)
        if started - max(status.st_mtime, status.st_ctime) > _SETTLED_SECONDS:
            self._known[key] = [*stamp, digest]
            self._learnt = True
        return digest

    def __enter__(self) -> FileHashCache:
        return self

    def __exit__(self, *error: object) -> None:
        if self._learnt and self._is_mine:
            with suppress(OSError):  # only a cache: a full or read-only disk costs the time of reading again
                self._memory.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(self._memory, json.dumps(self._known))


def stat_signature(path: Path) -> list[int]:
    """Return size, time of modification and time of change: another when the content is."""
    return _stamp(path.stat())


def _stamp(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _read_memory(memory: Path) -> tuple[dict[str, list[int | str]], bool]:
    """What is remembered, and whether the file may be replaced: it is not there, or holds nothing else."""
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, True
    except (OSError, ValueError):
        return {}, False
    if not isinstance(known, dict):
        return {}, False
    found = {key: value for key, value in known.items() if isinstance(value, list) and len(value) == 4}
    return found, len(found) == len(known)
