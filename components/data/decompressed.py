"""What decompressing readers have in common: content that comes in blocks, read in pieces of any size."""

from __future__ import annotations

import io
from io import BufferedReader
from typing import Any

BLOCK = 2**16
"""Bytes read from the file at a time."""


class Decompressed(io.RawIOBase):
    """The content of a compressed file. A kind of it says how the next block of content is found."""

    def __init__(self, stored: BufferedReader) -> None:
        self._stored = stored
        self._packed = b""
        """What was read from the file and not decompressed yet."""
        self._content = memoryview(b"")

    def next_content(self) -> bytes | None:
        """Some of the content, perhaps none yet; None at the end. Raises EOFError where it is cut short or damaged."""
        raise NotImplementedError

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            self._packed = self._packed or self._stored.read(BLOCK)
            content = self.next_content()
            if content is None:
                return 0
            self._content = memoryview(content)
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count
