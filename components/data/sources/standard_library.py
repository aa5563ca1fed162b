"""StandardLibrary: the source files of the Python standard library, the default corpus, available everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from components.data.document import Document, ReadStats
from components.data.document_index import DocumentFilter
from components.data.sources.base import FileSource
from components.data.sources.text_io import decode, normalize_newlines
from components.errors import InputError
from components.python_library import Split, library_files, source_encoding


@dataclass(kw_only=True)
class StandardLibrary(FileSource):
    """About 390 Python files, 8.6 MB, of the running interpreter. The split is the same for all Python versions."""

    split: Split = "train"  # type: ignore[assignment]
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
        yield Document(normalize_newlines(decode(data, log, source_encoding(data)), log))

    def reader_version(self, path: Path) -> str:
        return "StandardLibrary-1"

    def __str__(self) -> str:
        return f"the Python standard library ({self.split})"

    def files(self) -> dict[str, Path]:
        """Return relative path -> file of this split, sorted. Raises ValueError if the files are missing."""
        return library_files(self.split)
