"""An append-only file of whole records: a temporarily full disk leaves neither a partial record nor a gap."""

from __future__ import annotations

import errno
import os
from pathlib import Path

_MAX_PENDING_BYTES = 2**26


class AppendOnlyFile:
    """Writes each record immediately and whole, so that readers and crashes never see a partial one.

    Records that could not be written are kept, up to 64 MB, and written before the next one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)
        self._size = path.stat().st_size
        self._pending = b""

    def append(self, record: bytes) -> None:
        """Write `record`. Raises OSError if it could not be written yet."""
        if len(self._pending) + len(record) <= _MAX_PENDING_BYTES:
            self._pending += record
        self._write()

    def flush(self) -> None:
        """Write all pending records and fsync. Raises OSError."""
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
            if written != len(self._pending):  # a full disk writes what still fits, without an error
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        except OSError:
            os.ftruncate(self._file.fileno(), self._size)
            raise
        self._size += written
        self._pending = b""
