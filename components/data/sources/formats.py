"""Readers of file formats: plain text, JSON, CSV and Parquet, each yielding documents."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from components.data.document import Document, ReadStats
from components.data.sources.text_io import (
    COMPRESSED,
    MAX_LINE_BYTES,
    decode,
    normalize_newlines,
    open_text,
    read_blocks,
    read_lines,
)
from components.errors import extra_required

_COMPRESSIBLE = (".txt", ".jsonl", ".json", ".csv")
SUFFIXES = (*(kind + compression for kind in _COMPRESSIBLE for compression in ("", *COMPRESSED)), ".parquet")

_PART_CHARACTERS = 2**22
"""A longer document is yielded in parts, split after a line end if possible."""

_BLANK = re.compile(r"\s*")

_PARQUET_ROWS = 256


def format_of(path: Path) -> str:
    """Return the suffix of the format, without that of the compression, in lower case."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return name.suffix.lower()


def is_known_format(path: Path) -> bool:
    """Return whether the file name has one of SUFFIXES, and a stem."""
    return path.name.lower().endswith(SUFFIXES) and bool(format_of(path))


def read_text(path: Path, log: ReadStats, separator: str | None) -> Iterator[Document]:
    """Yield the documents of a `.txt` file: the whole file, or the parts between separators."""
    pending = ""
    for block in read_blocks(path, log):
        pending += block
        if separator:
            *finished, pending = pending.split(separator)
            yield from map(Document, finished)
        if len(pending) > _PART_CHARACTERS:
            # The last characters are kept back: they may be the start of a separator.
            cut = _split_point(pending, len(pending) - len(separator or ""))
            yield Document(pending[:cut], complete=False)
            pending = pending[cut:]
    if pending or not separator:
        yield Document(pending)


def read_json(path: Path, log: ReadStats, text_key: str) -> Iterator[Document]:
    """Yield the text under `text_key` of each object in a `.jsonl` or `.json` file: one per line, or one array."""
    for where, value in _json_values(path, log):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected a JSON object, found {json.dumps(value)[:60]}")
        text = value.get(text_key)
        if not isinstance(text, str):
            if text_key in value:
                raise ValueError(f"{where}: expected text under text_key = {text_key!r}, found {json.dumps(text)[:60]}")
            raise _no_text(where, text_key, "the object", value)
        yield from documents_of(text, log)


def read_csv(path: Path, log: ReadStats, text_key: str) -> Iterator[Document]:
    """Yield the column `text_key` of every row of a `.csv` file with a header line."""
    csv.field_size_limit(MAX_LINE_BYTES)
    rows = csv.reader((line for _, line in read_lines(path, log)), strict=True)
    header: list[str] | None = None
    try:
        for row in rows:
            if header is None:
                header = row
                if text_key not in header:
                    raise _no_text(f"{path}:1", text_key, "the header", header)
                column = header.index(text_key)
            elif len(row) != len(header):
                if row:
                    raise ValueError(f"{path}:{rows.line_num}: {len(row)} fields, but the header has {len(header)}")
            else:
                yield from documents_of(row[column], log)
    except csv.Error as error:
        raise ValueError(f"{path}:{rows.line_num}: {error}") from None


def read_parquet(path: Path, log: ReadStats, text_key: str) -> Iterator[Document]:
    """Yield the column `text_key` of every row of a `.parquet` file."""
    with extra_required(str(path), "pyarrow", "data"):
        import pyarrow as pa
        import pyarrow.parquet
    size, before, row = path.stat().st_size, log.source_bytes, 0
    try:
        with pa.parquet.ParquetFile(path) as file:
            if text_key not in file.schema_arrow.names:
                raise _no_text(str(path), text_key, "the file", file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[text_key], use_threads=False):
                for text in _column_values(batch.column(0), log):
                    if not isinstance(text, str):
                        raise ValueError(
                            f"{path} row {row}: expected text under text_key = {text_key!r}, found {text!r:.60}"
                        )
                    yield from documents_of(text, log)
                    row += 1
                log.source_bytes = before + size * row // max(row, file.metadata.num_rows, 1)
        log.source_bytes = before + size
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno:  # an error of the system; those of pyarrow have no errno
            raise
        raise ValueError(f"{path} is damaged, or is not a Parquet file: {error}") from error


def _column_values(column: Any, log: ReadStats) -> Iterator[Any]:
    """Yield the values of an Arrow array. Text is decoded as in text files, because it may be invalid UTF-8."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        yield from column.to_pylist()
        return
    for data in column.cast(pa.large_binary()).to_pylist():
        yield data if data is None else decode(data, log)


def documents_of(text: str, log: ReadStats) -> Iterator[Document]:
    """Yield `text` as a document, in parts if it is long."""
    text, start = normalize_newlines(text, log), 0
    while len(text) - start > _PART_CHARACTERS:
        cut = _split_point(text, start + _PART_CHARACTERS, start)
        yield Document(text[start:cut], complete=False)
        start = cut
    yield Document(text[start:])


def _split_point(text: str, end: int, start: int = 0) -> int:
    """Return where to split [start, end): after its last line end, or at `end`."""
    return text.rfind("\n", start, end) + 1 or end


def _json_values(path: Path, log: ReadStats) -> Iterator[tuple[str, Any]]:
    """Yield (place for messages, value) of each JSON value of the file."""
    if _is_array(path):
        yield from _array_values(path, log)
        return
    for number, line in read_lines(path, log):
        if line.isspace():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: expected a JSON object on each line ({error})") from None
        yield f"{path}:{number}", value


def _is_array(path: Path) -> bool:
    if format_of(path) != ".json":
        return False
    with open_text(path, ReadStats()) as (stream, _):
        return stream.peek(1).lstrip()[:1] == b"["


def _array_values(path: Path, log: ReadStats) -> Iterator[tuple[str, Any]]:
    """Yield (place for messages, item) of one array, read block by block."""
    blocks, decoder = read_blocks(path, log), json.JSONDecoder()
    text, at, number, opening = "", 0, 0, "["
    while True:
        at = _blank_end(text, at)
        if at < len(text):
            if text[at] == "]" and opening == ",":
                break
            if text[at] != opening:
                raise ValueError(f"{path} item {number}: expected {opening!r}, found {text[at : at + 60]!r}")
            start = _blank_end(text, at + 1)
            if text[start : start + 1] == "]" and opening == "[":
                at = start
                break
            try:
                value, end = decoder.raw_decode(text, start)
            except (ValueError, RecursionError) as error:
                if len(text) - at > MAX_LINE_BYTES:
                    raise ValueError(f"{path} item {number}: expected a JSON object ({error})") from None
            else:
                yield f"{path} item {number}", value
                at, number, opening = end, number + 1, ","
                continue
        # Double the text: with smaller steps, a large item would be parsed unsuccessfully many times.
        wanted, more = len(text) - at, [text[at:]]
        while (block := next(blocks, None)) is not None:
            more.append(block)
            wanted -= len(block)
            if wanted <= 0:
                break
        if len(more) == 1:
            raise ValueError(
                f"{path} item {number}: expected a JSON object, found {text[at : at + 60]!r} at the end of the file"
            )
        text, at = "".join(more), 0
    for after in (text[at + 1 :], *blocks):
        if after.strip():
            raise ValueError(f"{path}: expected the end after an array of {number} items, found {after.strip()[:60]!r}")


def _blank_end(text: str, at: int) -> int:
    match = _BLANK.match(text, at)
    assert match is not None
    return match.end()


def _no_text(where: str, text_key: str, container: str, keys: Any) -> ValueError:
    listed = ", ".join(sorted(keys)[:10])
    return ValueError(f"{where}: no text under text_key = {text_key!r}; {container} has {listed}")
