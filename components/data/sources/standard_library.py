"""StandardLibrary: the source files of the Python standard library, the default corpus, available everywhere."""

from __future__ import annotations

import hashlib
import io
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from components.data.document import Document, ReadStats
from components.data.document_index import DocumentFilter
from components.data.sources.base import FileSource
from components.data.sources.text_io import decode, normalize_newlines
from components.errors import InputError
from components.paths import raise_error

_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib-dynload", "ensurepip"}
_SKIPPED |= {"idlelib", "lib2to3", "turtledemo", "tkinter", "distutils", "msilib", "encodings"}
_SKIPPED_PREFIXES = ("config-", "_sysconfigdata")  # made per machine
_LEAST_BYTES = 2_000_000


@dataclass(kw_only=True)
class StandardLibrary(FileSource):
    """About 390 Python files, 8.6 MB, of the running interpreter. The split is the same for all Python versions."""

    split: Literal["train", "validation", "test"] = "train"  # type: ignore[assignment]
    """90 %, 5 % or 5 % of the files, selected by a hash of the file's path."""

    def document_filter(self) -> DocumentFilter:
        if self.validation_fraction:
            raise InputError(
                "validation_fraction", f"{type(self).__name__} has a fixed split, selected by `split`; remove this key"
            )
        return DocumentFilter(deduplicate=self.deduplicate, validation_fraction=0.0, split="train")

    def read(self, path: Path, log: ReadStats) -> Iterator[Document]:
        data = path.read_bytes()
        log.source_bytes += len(data)
        yield Document(normalize_newlines(decode(data, log, _encoding(data)), log))

    def reader_version(self, path: Path) -> str:
        return "StandardLibrary-1"

    def __str__(self) -> str:
        return f"the Python standard library ({self.split})"

    def files(self) -> dict[str, Path]:
        """Return relative path -> file of this split, sorted. Raises ValueError if the files are missing."""
        root = Path(sysconfig.get_paths()["stdlib"])
        files: dict[str, Path] = {}
        for directory, folders, names in os.walk(root, onerror=raise_error):
            folders[:] = filter(_is_included, folders)  # in place: os.walk does not enter removed ones
            found_here = (Path(directory, name) for name in names if name.endswith(".py") and _is_included(name))
            files.update((path.relative_to(root).as_posix(), path) for path in found_here)
        found = sum(path.stat().st_size for path in files.values())
        if found < _LEAST_BYTES:
            raise ValueError(
                f"only {found:,} bytes of Python source in {root}, expected {_LEAST_BYTES:,}: the library of "
                'this interpreter is zipped or stripped. Use other text: use = "components.data:TextFiles", path = ...'
            )
        return {name: path for name, path in sorted(files.items()) if split_of(name) == self.split}


def split_of(name: str) -> str:
    """Return the split of the file with the path `name`, relative to the library and with forward slashes."""
    bucket = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % 100
    return "validation" if bucket < 5 else "test" if bucket < 10 else "train"


def _is_included(name: str) -> bool:
    return name not in _SKIPPED and not name.startswith(_SKIPPED_PREFIXES)


def _encoding(data: bytes) -> str:
    """Return the encoding that Python would use: of the byte-order mark or the coding comment, else UTF-8."""
    try:
        return tokenize.detect_encoding(io.BytesIO(data).readline)[0]
    except SyntaxError:
        return "utf-8"
