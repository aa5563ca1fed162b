"""A file that grows by whole records: a disk that is full for a while leaves neither half of one nor a gap."""

from __future__ import annotations

import errno
import os
from pathlib import Path

_MOST_PENDING_BYTES = 2**26


class AppendOnlyFile:
    """Appends each record at once, so that a reader and a crash both see whole ones.

    What could not be written is kept, up to 64 MB, and written before the next record.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)
        self._size = path.stat().st_size
        self._pending = b""

    def append(self, record: bytes) -> None:
        """Raises OSError if it has to wait."""
        if len(self._pending) + len(record) <= _MOST_PENDING_BYTES:
            self._pending += record
        self._write()

    def flush(self) -> None:
        """Bring all of it to the disk. Raises OSError."""
        self._write()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        try:
            self._write()
        finally:
            self._file.close()

    def _write(self) -> None:
        if not self._pending:
            return
        try:
            written = self._file.write(self._pending)
            if written != len(self._pending):  # a disk takes what still fits, and no error
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        except OSError:
            os.ftruncate(self._file.fileno(), self._size)
            raise
        self._size += written
        self._pending = b""
