"""Gzip files as streams that end where their last member does, as those of the `gzip` command."""

from __future__ import annotations

import io
import os
import zlib
from io import BufferedReader
from typing import Any

from components.data.document import ReadingLog

_BLOCK = 2**16
_MAGIC = b"\x1f\x8b"
_MEMBER_WITH_HEADER = 16 + zlib.MAX_WBITS
"""For zlib: a gzip header before the data, a checksum after it, both checked."""


class Gzip(io.RawIOBase):
    """The content of all members of a file. Bytes after the last one are left out, and counted in `log`.

    Downloads and tapes leave such bytes. Python's own reader loses the last block of text over them.
    """

    def __init__(self, stored: BufferedReader, log: ReadingLog):
        self._stored, self._log = stored, log
        self._member: Any = zlib.decompressobj(_MEMBER_WITH_HEADER)
        self._packed = b""
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Raises EOFError or zlib.error for a member that is cut short or damaged."""
        while not self._content:
            self._packed = self._packed or self._stored.read(_BLOCK)
            if self._member.eof and not self._starts_member():
                return 0
            if not self._packed:
                raise EOFError("it ends before the end of its data")
            self._content = memoryview(self._member.decompress(self._packed))
            self._packed = self._member.unused_data
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count

    def _starts_member(self) -> bool:
        """Whether another member follows the one that has ended; zeros may stand between them."""
        while self._packed and len(self._packed.lstrip(b"\0")) < len(_MAGIC) and (more := self._stored.read(_BLOCK)):
            self._packed = self._packed.lstrip(b"\0") + more
        self._packed = self._packed.lstrip(b"\0")
        if self._packed.startswith(_MAGIC):
            self._member = zlib.decompressobj(_MEMBER_WITH_HEADER)
            return True
        if self._packed:
            at = self._stored.tell()
            self._log.repairs["bytes after the end of a .gz"] += (
                len(self._packed) + self._stored.seek(0, os.SEEK_END) - at
            )
            self._packed = b""
        return False
