"""Streams that decompress gzip and Zstandard files and detect truncated or damaged ones.

A new compression is a subclass of `Decompressed` here, and is registered in text_io.py (COMPRESSED, _SIGNATURES and
`open_text`).
"""

from __future__ import annotations

import io
import os
import zlib
from io import BufferedReader
from pathlib import Path
from typing import Any

from components.data.document import ReadStats

BLOCK = 2**16
"""Bytes read from the file at a time."""


class Decompressed(io.RawIOBase):
    """Base class: a stream of the content of a compressed file. Subclasses define `next_content`."""

    def __init__(self, file: BufferedReader) -> None:
        self._file = file
        self._packed = b""
        """Bytes read from the file and not decompressed yet."""
        self._content = memoryview(b"")

    def next_content(self) -> bytes | None:
        """Return some content, possibly empty, or None at the end. Raises EOFError for a truncated or damaged file."""
        raise NotImplementedError

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            self._packed = self._packed or self._file.read(BLOCK)
            content = self.next_content()
            if content is None:
                return 0
            self._content = memoryview(content)
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count


_MAGIC = b"\x1f\x8b"
_MEMBER_WITH_HEADER = 16 + zlib.MAX_WBITS
"""zlib checks the gzip header before the data and the checksum after it."""


class Gzip(Decompressed):
    """The content of all members of a gzip file. Bytes after the last member are ignored, and counted in `log`.

    Such bytes come from downloads and tapes; gzip.GzipFile loses the last block of text because of them.
    """

    def __init__(self, file: BufferedReader, log: ReadStats):
        super().__init__(file)
        self._log = log
        self._member: Any = zlib.decompressobj(_MEMBER_WITH_HEADER)

    def next_content(self) -> bytes | None:
        """Return some content, or None at the end. Raises EOFError or zlib.error for a truncated or damaged member."""
        if self._member.eof and not self._starts_member():
            return None
        if not self._packed:
            raise EOFError("it is truncated")
        content: bytes = self._member.decompress(self._packed)
        self._packed = self._member.unused_data
        return content

    def _starts_member(self) -> bool:
        """Start the next member if there is one, after optional zero bytes; return whether there is."""
        while self._packed and len(self._packed.lstrip(b"\0")) < len(_MAGIC) and (more := self._file.read(BLOCK)):
            self._packed = self._packed.lstrip(b"\0") + more
        self._packed = self._packed.lstrip(b"\0")
        if self._packed.startswith(_MAGIC):
            self._member = zlib.decompressobj(_MEMBER_WITH_HEADER)
            return True
        if self._packed:
            at = self._file.tell()
            self._log.fixups["bytes after the end of a .gz"] += len(self._packed) + self._file.seek(0, os.SEEK_END) - at
            self._packed = b""
        return False


class Zstandard(Decompressed):
    """The content of all frames of a Zstandard file. The reader of the library does not detect truncated files."""

    def __init__(self, file: BufferedReader, path: Path):
        """Raise ValueError if the `zstandard` library is missing."""
        super().__init__(file)
        try:
            import zstandard
        except ModuleNotFoundError:
            raise ValueError(f"{path} needs the `zstandard` library: pip install -e '.[data]'") from None
        self._library: Any = zstandard
        self._frame: Any = None

    def next_content(self) -> bytes | None:
        """Return some content, or None at the end. Raises EOFError for a truncated file or another format."""
        if not self._packed:
            if self._frame is not None:
                raise EOFError("it is truncated in the middle of a frame")
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
