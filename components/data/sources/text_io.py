"""Reading text files: decompressed, decoded, without byte-order mark, lines ending in LF. Fixes are counted."""

from __future__ import annotations

import codecs
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from components.data.document import ReadStats
from components.data.sources.decompression import Decompressed

BLOCK_BYTES = 2**22
"""Text is read in blocks of this size, so that memory does not grow with the file."""

MAX_LINE_BYTES = 2**28
"""Bytes. Without a limit, a file without line ends would be read completely."""

COMPRESSED = (".gz", ".zst")

_REPLACEMENT = "\ufffd"

_PROBE_BYTES = 512
_SIGNATURES = {
    b"\x1f\x8b\x08": "gzip",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"BZh9": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"PK\x03\x04": "zip",
    b"PAR1\x15": "Parquet",
    b"%PDF-": "PDF",
    b"\x93NUMPY": "NumPy",
    b"\x89HDF\r\n": "HDF5",
    b"SQLite format 3\x00": "SQLite",
    b"LITPKDS": "LitGPT packed",
    b"MMIDIDX\x00": "Megatron-LM index",
    b"version https://git-lfs": "Git LFS pointer",
}
"""First bytes of other formats, to detect files whose name does not match their content."""


def read_blocks(path: Path, log: ReadStats, block_bytes: int = BLOCK_BYTES) -> Iterator[str]:
    """Yield the text of `path` in blocks that never split a character or a line end."""
    rest = b""
    with open_text(path, log) as (stream, count_read):
        while block := stream.read(block_bytes):
            count_read()
            data = rest + block
            kept = len(data) - _incomplete_bytes(data)
            data, rest = data[:kept], data[kept:]
            yield normalize_newlines(decode(data, log), log)
    if rest:
        yield normalize_newlines(decode(rest, log), log)


def known_format(start: bytes) -> str | None:
    """Return the format of a file that begins with the bytes `start`, or None if they match no signature."""
    return next((name for signature, name in _SIGNATURES.items() if start.startswith(signature)), None)


def read_lines(path: Path, log: ReadStats) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text with line end). Raises ValueError for a line over MAX_LINE_BYTES."""
    with open_text(path, log) as (stream, count_read):
        number = 0
        while line := stream.readline(MAX_LINE_BYTES):
            count_read()
            number += 1
            if len(line) == MAX_LINE_BYTES:
                raise ValueError(
                    f"{path}:{number}: a line has more than {MAX_LINE_BYTES:,} bytes; is this a text file?"
                )
            yield number, decode(line, log)


def decode(data: bytes, log: ReadStats, encoding: str = "utf-8") -> str:
    """Return `data` as text; invalid bytes become U+FFFD and are counted."""
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        text = data.decode(encoding, errors="replace")
        log.fixups["replaced characters"] += text.count(_REPLACEMENT) - data.count(_REPLACEMENT.encode())
        return text


def normalize_newlines(text: str, log: ReadStats) -> str:
    """Return `text` with CRLF and CR replaced by LF, counted."""
    if "\r" in text:
        log.fixups["line ends"] += text.count("\r")
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text


@contextmanager
def open_text(path: Path, log: ReadStats) -> Iterator[tuple[BufferedReader, Callable[[], None]]]:
    """Open the decompressed content of `path`, after its byte-order mark.

    Yields the stream and a function that updates `log.source_bytes`. Raises ValueError for a damaged compressed file,
    for UTF-16 and for files that are not text.
    """
    before = log.source_bytes
    with path.open("rb") as file:
        stream = file
        if path.suffix.lower() in COMPRESSED:
            if not os.fstat(file.fileno()).st_size:
                raise ValueError(f"{path} is damaged, or is not a {path.suffix} file: it is empty")
            stream = BufferedReader(Decompressed(file, path, log), BLOCK_BYTES)

        def count_read() -> None:
            log.source_bytes = before + file.tell()

        try:
            start = stream.peek(_PROBE_BYTES)[:_PROBE_BYTES]
            if (other := known_format(start)) is not None:
                remedy = (
                    "fetch the file with git lfs pull"
                    if "LFS" in other
                    else "decompress or convert it, or correct its suffix"
                )
                raise ValueError(f"{path} is not text but a {other} file; {remedy}")
            if start.startswith(codecs.BOM_UTF8):
                stream.read(3)
                log.fixups["byte-order marks"] += 1
            elif start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise ValueError(f"{path} is UTF-16; convert it to UTF-8, for example with iconv -f utf-16 -t utf-8")
            elif start.count(0) > _PROBE_BYTES // 4:  # UTF-16 without a mark, or a binary file
                raise ValueError(f"{path} is not text: {start.count(0)} of its first {len(start)} bytes are 0")
            yield stream, count_read
        except EOFError as error:
            raise ValueError(f"{path} is damaged, or is not a {path.suffix} file: {error}") from error


def _incomplete_bytes(data: bytes) -> int:
    """Return how many bytes at the end of `data` the next block may complete: a CR or the start of a character."""
    if data.endswith(b"\r"):
        return 1
    tail = data[-3:]
    return len(tail) - codecs.utf_8_decode(tail, "ignore", False)[1]
