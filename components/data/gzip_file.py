"""Gzip files as streams that end where their last member does, as those of the `gzip` command."""

from __future__ import annotations

import os
import zlib
from io import BufferedReader
from typing import Any

from components.data.decompressed import BLOCK, Decompressed
from components.data.document import ReadingLog

_MAGIC = b"\x1f\x8b"
_MEMBER_WITH_HEADER = 16 + zlib.MAX_WBITS
"""For zlib: a gzip header before the data, a checksum after it, both checked."""


class Gzip(Decompressed):
    """The content of all members of a file. Bytes after the last one are left out, and counted in `log`.

    Downloads and tapes leave such bytes. Python's own reader loses the last block of text over them.
    """

    def __init__(self, stored: BufferedReader, log: ReadingLog):
        super().__init__(stored)
        self._log = log
        self._member: Any = zlib.decompressobj(_MEMBER_WITH_HEADER)

    def next_content(self) -> bytes | None:
        """Raises EOFError or zlib.error for a member that is cut short or damaged."""
        if self._member.eof and not self._starts_member():
            return None
        if not self._packed:
            raise EOFError("it ends before the end of its data")
        content: bytes = self._member.decompress(self._packed)
        self._packed = self._member.unused_data
        return content

    def _starts_member(self) -> bool:
        """Whether another member follows the one that has ended; zeros may stand between them."""
        while self._packed and len(self._packed.lstrip(b"\0")) < len(_MAGIC) and (more := self._stored.read(BLOCK)):
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
