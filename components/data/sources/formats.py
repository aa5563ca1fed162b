"""Kinds of files, each as documents: plain text, JSON, CSV and Parquet."""

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

_COMPRESSIBLE = (".txt", ".jsonl", ".json", ".csv")
SUFFIXES = (*(kind + packed for kind in _COMPRESSIBLE for packed in ("", *COMPRESSED)), ".parquet")

_PART_CHARACTERS = 2**22
"""A document longer than this is handed on in parts, cut after a line where it has any."""

_BLANK = re.compile(r"\s*")

_PARQUET_ROWS = 256


def format_of(path: Path) -> str:
    """The suffix that says what is in the file, without that of its compression."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return name.suffix.lower()


def is_known_format(path: Path) -> bool:
    """Whether its name ends in one of SUFFIXES, and is more than that."""
    return path.name.lower().endswith(SUFFIXES) and bool(format_of(path))


def read_text(path: Path, log: ReadStats, separator: str | None) -> Iterator[Document]:
    """A `.txt` file: one document, or those between separators."""
    pending = ""
    for block in read_blocks(path, log):
        pending += block
        if separator:
            *finished, pending = pending.split(separator)
            yield from map(Document, finished)
        if len(pending) > _PART_CHARACTERS:
            # Not within the last characters: they may be the first half of a separator.
            cut = _cut(pending, len(pending) - len(separator or ""))
            yield Document(pending[:cut], complete=False)
            pending = pending[cut:]
    if pending or not separator:
        yield Document(pending)


def read_json(path: Path, log: ReadStats, text_key: str) -> Iterator[Document]:
    """A `.jsonl` or `.json` file: an object on each line, or one array of objects. The text is under `text_key`."""
    for where, value in _json_values(path, log):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected a JSON object, found {json.dumps(value)[:60]}")
        text = value.get(text_key)
        if not isinstance(text, str):
            if text_key in value:
                raise ValueError(f"{where}: no text under text_key = {text_key!r}, but {json.dumps(text)[:60]}")
            raise _no_text(where, text_key, "it", value)
        yield from documents_of(text, log)


def read_csv(path: Path, log: ReadStats, text_key: str) -> Iterator[Document]:
    """A `.csv` file with a header line: the column `text_key` of every row."""
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
                    raise ValueError(f"{path}:{rows.line_num}: {len(row)} fields where the header has {len(header)}")
            else:
                yield from documents_of(row[column], log)
    except csv.Error as error:
        raise ValueError(f"{path}:{rows.line_num}: {error}") from None


def read_parquet(path: Path, log: ReadStats, text_key: str) -> Iterator[Document]:
    """A `.parquet` file: the column `text_key` of every row."""
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise ValueError(f"{path}: this needs the `pyarrow` library: pip install -e '.[data]'") from None
    size, before, row = path.stat().st_size, log.source_bytes, 0
    try:
        with pa.parquet.ParquetFile(path) as file:
            if text_key not in file.schema_arrow.names:
                raise _no_text(str(path), text_key, "the file", file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[text_key], use_threads=False):
                for text in _column_values(batch.column(0), log):
                    if not isinstance(text, str):
                        raise ValueError(f"{path} row {row}: no text under text_key = {text_key!r}, but {text!r:.60}")
                    yield from documents_of(text, log)
                    row += 1
                log.source_bytes = before + size * row // file.metadata.num_rows
        log.source_bytes = before + size
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # of the system, which says what it is; pyarrow's own has none
            raise
        raise ValueError(f"{path} is damaged, or no Parquet file: {error}") from error


def _column_values(column: Any, log: ReadStats) -> Iterator[Any]:
    """Yield the values of an Arrow array. Text is decoded here, as that of text files: its bytes may be of any kind."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        yield from column.to_pylist()
        return
    for data in column.cast(pa.large_binary()).to_pylist():
        yield data if data is None else decode(data, log)


def documents_of(text: str, log: ReadStats) -> Iterator[Document]:
    """A text that is in memory as a document, in parts if it is long."""
    text, start = normalize_newlines(text, log), 0
    while len(text) - start > _PART_CHARACTERS:
        cut = _cut(text, start + _PART_CHARACTERS, start)
        yield Document(text[start:cut], complete=False)
        start = cut
    yield Document(text[start:])


def _cut(text: str, end: int, start: int = 0) -> int:
    """Where to cut a part of [start, end): after the last line, or at `end`."""
    return text.rfind("\n", start, end) + 1 or end


def _json_values(path: Path, log: ReadStats) -> Iterator[tuple[str, Any]]:
    """(where, value) of each."""
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
    """The items of one array, read block by block."""
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
        # At least as much again, or a large item would be tried in vain very often.
        wanted, more = len(text) - at, [text[at:]]
        while (block := next(blocks, None)) is not None:
            more.append(block)
            wanted -= len(block)
            if wanted <= 0:
                break
        if len(more) == 1:
            raise ValueError(f"{path} item {number}: expected a JSON object, found {text[at : at + 60]!r} at the end")
        text, at = "".join(more), 0
    for after in (text[at + 1 :], *blocks):
        if after.strip():
            raise ValueError(f"{path}: after its array of {number} items comes {after.strip()[:60]!r}")


def _blank_end(text: str, at: int) -> int:
    match = _BLANK.match(text, at)
    assert match is not None
    return match.end()


def _no_text(where: str, text_key: str, what: str, keys: Any) -> ValueError:
    listed = ", ".join(sorted(keys)[:10])
    return ValueError(f"{where}: no text under text_key = {text_key!r}; {what} has {listed}")
