"""Text files of one's own: plain text, JSON, CSV and Parquet, compressed or not."""

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

log = logging.getLogger("powertrain")

_READERS = {".jsonl": read_json, ".json": read_json, ".csv": read_csv, ".parquet": read_parquet}


@dataclass(kw_only=True)
class TextFiles(FileSource):
    """`.txt`, `.jsonl`, `.json` (lines, or one array), `.csv`, each also `.gz` and `.zst`, and `.parquet`, by name.

    A `.txt` file is one document, a JSON object or a row is one. Byte-order marks, CRLF and invalid UTF-8 are put right
    and counted, documents without text are dropped and counted. A line that is no JSON object, or has no text where
    `text_key` says, stops the preparation with its file and line: it may be one of very many, and silence would hide
    that.
    """

    path: Path | list[Path]
    """A file, a directory (searched with all below it) or a glob pattern such as "corpus/**/*.jsonl.gz"; or several."""
    text_key: str = "text"
    """The key of the text in a JSON object, the column in `.csv` and `.parquet`."""
    document_separator: str | None = None
    """Cuts `.txt` files into documents, for example "<|endoftext|>\\n". Without it a file is one document."""

    def __post_init__(self) -> None:
        if self.document_separator == "":
            raise ValueError('document_separator: "" separates nothing; leave the key out')
        if "\r" in (self.document_separator or ""):
            raise InputError(
                "document_separator",
                f"{self.document_separator!r} is nowhere, for line ends are put right to \\n first",
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
        return ", ".join(map(str, self.path)) if isinstance(self.path, list) else str(self.path)

    def files(self) -> dict[str, Path]:
        """Name, relative to the directory all have in common, -> file; sorted by name.

        Raises OSError where a path matches nothing or cannot be seen in full, ValueError for a file of another kind.
        """
        found: set[Path] = set()
        try:
            for path in self.path if isinstance(self.path, list) else [self.path]:
                # Links are not followed: those of the Hub's cache lead to files whose names say nothing of their kind.
                found.update(Path(os.path.abspath(file)) for file in _matches(path))  # noqa: PTH100
            if not found:
                raise FileNotFoundError("[] names no file, directory or glob pattern")
        except (OSError, ValueError) as error:
            raise InputError.below("path", error) from None
        if twice := sorted(file for file in found if file.suffix in COMPRESSED and file.with_suffix("") in found):
            _warn_once(f"{len(twice)} files are read packed and unpacked, the first {twice[0]}; remove one of the two")
        common = os.path.commonpath([file.parent for file in found])
        return {file.relative_to(common).as_posix(): file for file in sorted(found)}


def _matches(path: Path) -> Sequence[Path]:
    if is_file(path):
        if not is_known_format(path):
            raise ValueError(f"{path} does not end in {', '.join(SUFFIXES)}")
        return [path]
    files = list(walk_files(path)) if path.is_dir() else glob_files(_pattern(path))
    found = [file for file in files if is_known_format(file)]
    if not found and files:
        raise ValueError(f"{path} matches {len(files)} files, none of which ends in {', '.join(SUFFIXES)}")
    if not found:
        raise FileNotFoundError(f"{path} matches no file that ends in {', '.join(SUFFIXES)}")
    for file in found:
        if not is_file(file):
            raise ValueError(f"{file} is not a regular file")
    if len(found) < len(files):
        kinds = Counter(file.suffix or file.name for file in files if not is_known_format(file)).most_common(5)
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds)
        _warn_once(f"{path}: {len(files) - len(found)} of {len(files)} files are of other kinds and not read: {listed}")
    return found


@cache
def _warn_once(message: str) -> None:
    """A source is opened several times in a run."""
    log.warning(message)


def _pattern(path: Path) -> str:
    """`path` as a glob pattern, in which a folder that exists is meant literally, also one that is called `run[1]`."""
    folder = next(folder for folder in path.parents if folder.is_dir())
    return str(Path(glob.escape(str(folder)), path.relative_to(folder)))
