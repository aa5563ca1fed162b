"""What is in a file: SHA-256, remembered, so that a file that did not change is read once in its life."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from types import TracebackType

_BLOCK = 2**20
_SETTLED_SECONDS = 2.0
"""A file younger than this may change again without its times showing it; such a hash is not remembered."""


class FileHashes:
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

    def __enter__(self) -> FileHashes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not (self._learnt and self._is_mine):
            return
        aside = self._memory.with_name(f"{self._memory.name}.{os.getpid()}")
        try:
            aside.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text(json.dumps(self._known), encoding="utf-8")
            aside.replace(self._memory)
        except OSError:  # only memory: a full or read-only disk costs the time of reading again
            aside.unlink(missing_ok=True)


def stamp_of(path: Path) -> list[int]:
    """Size, time of modification and time of change: another when the content is."""
    return _stamp(path.stat())


def _stamp(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def hash_file(path: Path) -> str:
    """SHA-256 of the content of `path`, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


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
