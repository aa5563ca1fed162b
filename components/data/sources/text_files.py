"""TextFiles: local files of plain text, JSON, CSV and Parquet, compressed or not."""

from __future__ import annotations

import glob
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from components.data.document import Document, ReadStats
from components.data.sources.base import FileSource
from components.data.sources.formats import (
    SUFFIXES,
    format_of,
    is_known_format,
    read_csv,
    read_json,
    read_parquet,
    read_text,
)
from components.data.sources.text_io import COMPRESSED
from components.errors import InputError
from components.paths import glob_files, is_file, walk_files
from components.storage.address import display
from components.storage.local_copy import fetch

log = logging.getLogger("powertrain")

_READERS = {".jsonl": read_json, ".json": read_json, ".csv": read_csv, ".parquet": read_parquet}


@dataclass(kw_only=True)
class TextFiles(FileSource):
    """`.txt`, `.jsonl`, `.json` (lines, or one array), `.csv`, each also with `.gz` or `.zst`, and `.parquet` files.

    A document is a `.txt` file, a JSON object or a row. Byte-order marks, CRLF and invalid UTF-8 are fixed and counted;
    documents without text are dropped and counted. A line that is not a JSON object, or has no text under `text_key`,
    is an error with its file and line, because a wrong key would affect many lines.
    """

    path: Path | list[Path]
    """A file, a directory (searched recursively) or a glob pattern such as "corpus/**/*.jsonl.gz"; or several."""
    text_key: str = "text"
    """The key of the text in a JSON object, or its column in `.csv` and `.parquet`."""
    document_separator: str | None = None
    """Separates documents in `.txt` files, for example "<|endoftext|>\\n"; unset: a file is one document."""

    def __post_init__(self) -> None:
        if self.document_separator == "":
            raise InputError("document_separator", '"" is empty; set a text, or remove the key')
        if "\r" in (self.document_separator or ""):
            raise InputError(
                "document_separator",
                f"{self.document_separator!r} can never match: line ends are normalized to \\n; use \\n",
            )

    def read(self, path: Path, log: ReadStats) -> Iterator[Document]:
        kind = format_of(path)
        if kind == ".txt":
            return read_text(path, log, self.document_separator)
        return _READERS[kind](path, log, self.text_key)

    def reader_version(self, path: Path) -> str:
        kind = format_of(path)
        return f"{kind}-1 {json.dumps(self.document_separator if kind == '.txt' else self.text_key)}"

    def __str__(self) -> str:
        return ", ".join(map(display, self.path)) if isinstance(self.path, list) else display(self.path)

    def files(self) -> dict[str, Path]:
        """Return name -> file, sorted by name, which is relative to the common directory of all files.

        Raises OSError if a path matches no file or cannot be searched completely, ValueError for another format.
        """
        found: set[Path] = set()
        try:
            for path in self.path if isinstance(self.path, list) else [self.path]:
                # Links are not resolved: those in the cache of the Hub point to files without a suffix.
                found.update(Path(os.path.abspath(file)) for file in _matches(path))  # noqa: PTH100
            if not found:
                raise FileNotFoundError("[] is empty; expected a file, directory or glob pattern")
        except (OSError, ValueError) as error:
            raise InputError.below("path", error) from None
        if duplicates := sorted(file for file in found if file.suffix in COMPRESSED and file.with_suffix("") in found):
            _warn_once(
                f"{len(duplicates)} files are read compressed and uncompressed, such as {duplicates[0]}; remove one"
            )
        common = os.path.commonpath([file.parent for file in found])
        return {file.relative_to(common).as_posix(): file for file in sorted(found)}


def _matches(path: Path) -> Sequence[Path]:
    fetch(path)
    if is_file(path):
        if not is_known_format(path):
            raise ValueError(f"{path} does not end in {', '.join(SUFFIXES)}")
        return [path]
    if not path.exists() and not glob.has_magic(str(path)):
        raise FileNotFoundError(f"{path} does not exist")
    files = list(walk_files(path)) if path.is_dir() else glob_files(_pattern(path))
    found = [file for file in files if is_known_format(file)]
    if not found and files:
        raise ValueError(f"{path} matches {len(files)} files, but none ends in {', '.join(SUFFIXES)}")
    if not found:
        raise FileNotFoundError(f"{path} matches no file that ends in {', '.join(SUFFIXES)}")
    for file in found:
        if not is_file(file):
            raise ValueError(f"{file} is not a regular file")
    if len(found) < len(files):
        kinds = Counter(file.suffix or file.name for file in files if not is_known_format(file)).most_common(5)
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds)
        _warn_once(
            f"{path}: {len(files) - len(found)} of {len(files)} files have other formats and are not read: {listed}"
        )
    return found


@cache
def _warn_once(message: str) -> None:
    """Log a warning once, although a source is opened several times in a run."""
    log.warning(message)


def _pattern(path: Path) -> str:
    """Return `path` as a glob pattern, with existing directories escaped, such as one named `run[1]`."""
    folder = next(folder for folder in path.parents if folder.is_dir())
    return str(Path(glob.escape(str(folder)), path.relative_to(folder)))
