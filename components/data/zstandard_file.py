"""Zstandard files as streams that notice when they are cut short."""

from __future__ import annotations

import io
from io import BufferedReader
from pathlib import Path
from typing import Any

_BLOCK = 2**16


class Zstandard(io.RawIOBase):
    """The content of all frames of a file. The library's own reader takes a file that was cut for one that ends."""

    def __init__(self, stored: BufferedReader, path: Path):
        """Raises ValueError if the `zstandard` library is missing."""
        try:
            import zstandard
        except ModuleNotFoundError:
            raise ValueError(f"{path}: this needs the `zstandard` library: pip install -e '.[data]'") from None
        self._library: Any = zstandard
        self._stored = stored
        self._frame: Any = None
        self._packed = b""
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Raises EOFError for a file that is cut short or holds something else."""
        while not self._content:
            self._packed = self._packed or self._stored.read(_BLOCK)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            if self._frame is None:
                self._frame = self._library.ZstdDecompressor().decompressobj()
            try:
                self._content = memoryview(self._frame.decompress(self._packed))
            except self._library.ZstdError as error:
                raise EOFError(str(error)) from error
            self._packed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count
