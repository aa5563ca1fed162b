"""Zstandard files as streams that notice when they are cut short."""

from __future__ import annotations

from io import BufferedReader
from pathlib import Path
from typing import Any

from components.data.decompressed import Decompressed


class Zstandard(Decompressed):
    """The content of all frames of a file. The library's own reader takes a file that was cut for one that ends."""

    def __init__(self, stored: BufferedReader, path: Path):
        """Raises ValueError if the `zstandard` library is missing."""
        super().__init__(stored)
        try:
            import zstandard
        except ModuleNotFoundError:
            raise ValueError(f"{path}: this needs the `zstandard` library: pip install -e '.[data]'") from None
        self._library: Any = zstandard
        self._frame: Any = None

    def next_content(self) -> bytes | None:
        """Raises EOFError for a file that is cut short or holds something else."""
        if not self._packed:
            if self._frame is not None:
                raise EOFError("it ends in the middle of a frame")
            return None
        if self._frame is None:
            self._frame = self._library.ZstdDecompressor().decompressobj()
        try:
            content: bytes = self._frame.decompress(self._packed)
        except self._library.ZstdError as error:
            raise EOFError(str(error)) from error
        self._packed = self._frame.unused_data
        if self._frame.eof:
            self._frame = None
        return content
