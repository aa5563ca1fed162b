"""TextSource and FileSource: base classes of text sources, which are tokenized on first use.

To add a custom source, subclass `TextSource` and define `documents` and `fingerprint`. For a source that consists of
files, subclass `FileSource` and define `files`, `read` and `reader_version`; its files are tokenized in parallel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from components.cpu import num_cpus
from components.data.cache import CacheEntry
from components.data.dataset import TextDataset
from components.data.document import Document, ReadStats, SourceFile
from components.data.document_index import DocumentFilter
from components.data.file_hash_cache import HASH_CACHE_FILE, FileHashCache, stat_signature
from components.errors import InputError
from components.interfaces import Tokenizer

_LINE_SECONDS = 5.0


@dataclass(kw_only=True)
class TextSource(ABC):
    """A [data] section: documents that are tokenized into `cache_dir` on first use and read from there afterwards."""

    deduplicate: bool = False
    """Drop documents whose text is identical to that of an earlier one."""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the documents in the validation split, selected by a hash of their text; 0: no such split."""
    split: Literal["train", "validation"] = "train"
    """Use the documents of the validation split, or all other documents."""

    @abstractmethod
    def documents(self, log: ReadStats) -> Iterator[Document]:
        """Yield every document in a fixed order, and count in `log` the bytes read and the fixes.

        Raises ValueError or OSError, naming file and line, for a file that cannot be read. Documents without text may
        be yielded: they are dropped and counted.
        """

    @abstractmethod
    def fingerprint(self, hashes: FileHashCache) -> str:
        """Return a string that changes whenever `documents` could yield other text. `hashes` caches hashes of files."""

    def size_bytes(self) -> int:
        """Return the value of `ReadStats.source_bytes` after the last document, to estimate time; 0 if unknown."""
        return 0

    def source_files(self, hashes: FileHashCache) -> list[SourceFile]:
        """Return the parts of the source that are tokenized independently, in order; by default, a single one."""
        return [SourceFile(str(self), self.fingerprint(hashes), self.size_bytes(), self.documents)]

    def build(
        self, *, tokenizer: Tokenizer, sequence_length: int, cache_dir: Path, progress: Callable[[str], None]
    ) -> TextDataset:
        """Tokenize the source if needed, verify the result and return it as a dataset.

        `progress` receives a line every few seconds. With several processes, call it in one of them first: concurrent
        calls are safe, but all of them tokenize. Raises ValueError or OSError for bad input or damaged shards.
        """
        entry = self.cache_entry(tokenizer, cache_dir)
        is_new = entry.prepare(lambda state: progress(str(state)), _LINE_SECONDS)
        dataset = entry.open(sequence_length)
        if is_new:
            progress(f"prepared {dataset.index.source}: {dataset.index}")
        return dataset

    def cache_entry(self, tokenizer: Tokenizer, cache_dir: Path) -> CacheEntry:
        """Return the entry of this source in `cache_dir`, which may not be prepared yet."""
        with FileHashCache(cache_dir / HASH_CACHE_FILE) as hashes:
            source_files = self.source_files(hashes)
        return CacheEntry(cache_dir, tokenizer, type(self).__name__, str(self), source_files, self.document_filter())

    def document_filter(self) -> DocumentFilter:
        """Return the filter of documents. Raises InputError for contradictory keys."""
        if self.split == "validation" and not self.validation_fraction:
            raise InputError(
                "split", "validation_fraction = 0 makes no validation split; set it to the fraction of documents in it"
            )
        return DocumentFilter(
            deduplicate=self.deduplicate, validation_fraction=float(self.validation_fraction), split=self.split
        )


@dataclass(kw_only=True)
class FileSource(TextSource):
    """A source that consists of files. Their order is that of `files`; their location does not matter."""

    @abstractmethod
    def files(self) -> dict[str, Path]:
        """Return name for display -> file, in order. Raises ValueError or OSError if there are none."""

    @abstractmethod
    def read(self, path: Path, log: ReadStats) -> Iterator[Document]:
        """Yield the documents of one file, as `documents` does."""

    @abstractmethod
    def reader_version(self, path: Path) -> str:
        """Return a string that changes whenever `read` would yield other documents for the same bytes."""

    def documents(self, log: ReadStats) -> Iterator[Document]:
        for path in self.files().values():
            yield from self.read(path, log)

    def fingerprint(self, hashes: FileHashCache) -> str:
        return repr([source_file.content for source_file in self.source_files(hashes)])

    def size_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files().values())

    def source_files(self, hashes: FileHashCache) -> list[SourceFile]:
        files = self.files()
        signatures = list(map(stat_signature, files.values()))
        with ThreadPoolExecutor(min(8, num_cpus())) as pool:  # hashing releases the GIL
            digests = list(pool.map(hashes.sha256, files.values()))
        return [
            SourceFile(
                name,
                f"{self.reader_version(path)} {digest}",
                signature[0],
                partial(_read_as_hashed, self.read, path, signature),
            )
            for (name, path), digest, signature in zip(files.items(), digests, signatures, strict=True)
        ]


def _read_as_hashed(
    read: Callable[[Path, ReadStats], Iterator[Document]], path: Path, signature: list[int], log: ReadStats
) -> Iterator[Document]:
    """Yield the documents of a file. Raises OSError if it changed since it was hashed.

    The shards are stored under that hash.
    """
    yield from read(path, log)
    if stat_signature(path) != signature:
        raise OSError(f"{path} changed while it was prepared; start again once it is complete")
