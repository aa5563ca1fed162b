"""Decompressed: the content of a gzip or Zstandard file; a truncated or damaged file is an error.

gzip.GzipFile loses the last block of text if bytes follow the last member, as in downloads and on tapes, and the reader
of the zstandard library does not detect truncated files. A new compression is added here, and to COMPRESSED and
_SIGNATURES of text_io.py.
"""

from __future__ import annotations

import io
import os
import zlib
from io import BufferedReader
from pathlib import Path
from typing import Any

from components.data.document import ReadStats
from components.errors import extra_required

_BLOCK_BYTES = 2**16
_GZIP_MAGIC = b"\x1f\x8b"
_WITH_GZIP_HEADER = 16 + zlib.MAX_WBITS
"""zlib checks the gzip header before the data and the checksum after it."""


class Decompressed(io.RawIOBase):
    """The content of all members of a gzip file, or of all frames of a Zstandard file.

    Bytes after the last member of a gzip file are ignored, and counted in `log`. Reading raises EOFError for a
    truncated or damaged file.
    """

    def __init__(self, file: BufferedReader, path: Path, log: ReadStats) -> None:
        """Raise ValueError if the `zstandard` library is needed and missing."""
        self._file, self._log = file, log
        self._member: Any = None
        """The member that is being decompressed."""
        self._packed = b""
        """Bytes read from the file and not decompressed yet."""
        self._content = memoryview(b"")
        self._is_gzip = path.suffix.lower() == ".gz"
        self._error: type[Exception] = zlib.error
        if not self._is_gzip:
            with extra_required(str(path), "zstandard", "data"):
                import zstandard
            self._library: Any = zstandard
            self._error = zstandard.ZstdError

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            self._packed = self._packed or self._file.read(_BLOCK_BYTES)
            if self._member is None:
                if not self._packed:
                    return 0
                self._member = self._new_member()
            if not self._packed:
                raise EOFError("it is truncated")
            try:
                self._content = memoryview(self._member.decompress(self._packed))
            except self._error as error:
                raise EOFError(str(error)) from error
            self._packed = self._member.unused_data
            if self._member.eof:
                self._member = None
                if self._is_gzip:
                    self._skip_padding()
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count

    def _new_member(self) -> Any:
        if self._is_gzip:
            return zlib.decompressobj(_WITH_GZIP_HEADER)
        return self._library.ZstdDecompressor().decompressobj()

    def _skip_padding(self) -> None:
        """After a member of gzip, skip zero bytes, and everything else that is not another member."""
        self._packed = self._packed.lstrip(b"\0")
        while len(self._packed) < len(_GZIP_MAGIC) and (more := self._file.read(_BLOCK_BYTES)):
            self._packed = (self._packed + more).lstrip(b"\0")
        if self._packed and not self._packed.startswith(_GZIP_MAGIC):
            at = self._file.tell()
            self._log.fixups["bytes after the end of a .gz"] += len(self._packed) + self._file.seek(0, os.SEEK_END) - at
            self._packed = b""
