"""What every source of text shares: it prepares itself on first use and opens as packed sequences.

To bring your own, subclass `TextSource` and say two things: how to iterate the documents, and what tells one content
from another. A source that is made of files subclasses `FileSource` instead, and its files are prepared side by side.
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
from components.data.file_hash_cache import HASH_CACHE_FILE, FileHashCache, stat_signature
from components.data.index import DocumentFilter
from components.errors import InputError
from components.interfaces import Tokenizer

_LINE_SECONDS = 5.0


@dataclass(kw_only=True)
class TextSource(ABC):
    """A [data] section: documents that are tokenized once into `cache_dir` and read from there ever after."""

    deduplicate: bool = False
    """Leave out documents whose text is exactly that of an earlier one."""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the documents in the validation split, chosen by a hash of their text; 0: there is no such split."""
    split: Literal["train", "validation"] = "train"
    """Use the documents of the validation split, or all others."""

    @abstractmethod
    def documents(self, log: ReadStats) -> Iterator[Document]:
        """Every document, in an order that does not change. Count in `log` what is read and put right.

        Raises ValueError or OSError, naming file and line, for what cannot be read. Documents without text may be
        yielded: they are dropped, and counted.
        """

    @abstractmethod
    def fingerprint(self, hashes: FileHashCache) -> str:
        """Text that changes whenever `documents` could yield anything else. `hashes` remembers what is in files."""

    def size_bytes(self) -> int:
        """Bytes that `log.source_bytes` will have reached at the end, for the time left; 0 if unknown."""
        return 0

    def source_files(self, hashes: FileHashCache) -> list[SourceFile]:
        """The source in parts that can be prepared one without the other, in order; here it is one part."""
        return [SourceFile(str(self), self.fingerprint(hashes), self.size_bytes(), self.documents)]

    def build(
        self, *, tokenizer: Tokenizer, sequence_length: int, cache_dir: Path, progress: Callable[[str], None]
    ) -> TextDataset:
        """Prepare on first use, then open, verified. `progress` takes a line every few seconds of preparing.

        With several processes let one build first: the others then find the work done (doing it together is safe, but
        every one of them would tokenize). Raises ValueError or OSError for bad input or damaged shards.
        """
        entry = self.cache_entry(tokenizer, cache_dir)
        is_new = entry.prepare(lambda state: progress(str(state)), _LINE_SECONDS)
        dataset = entry.open(sequence_length)
        if is_new:
            progress(f"prepared {dataset.index.source}: {dataset.index}")
        return dataset

    def cache_entry(self, tokenizer: Tokenizer, cache_dir: Path) -> CacheEntry:
        """Return where in `cache_dir` this source is prepared or will be."""
        with FileHashCache(cache_dir / HASH_CACHE_FILE) as hashes:
            source_files = self.source_files(hashes)
        return CacheEntry(cache_dir, tokenizer, type(self).__name__, str(self), source_files, self.document_filter())

    def document_filter(self) -> DocumentFilter:
        """Return which documents are used. Raises InputError for keys that contradict each other."""
        if self.split == "validation" and not self.validation_fraction:
            raise InputError(
                "split", "there is no validation split: set validation_fraction, the fraction of documents in it"
            )
        return DocumentFilter(
            deduplicate=self.deduplicate, validation_fraction=float(self.validation_fraction), split=self.split
        )


@dataclass(kw_only=True)
class FileSource(TextSource):
    """A source that is made of files. Their order is that of `files`; where they lie does not matter."""

    @abstractmethod
    def files(self) -> dict[str, Path]:
        """Name, for people -> file, in order. Raises ValueError or OSError where there is none."""

    @abstractmethod
    def read(self, path: Path, log: ReadStats) -> Iterator[Document]:
        """The documents of one file; as `documents`."""

    @abstractmethod
    def reader_version(self, path: Path) -> str:
        """Text that changes whenever `read` would make other documents of the same bytes: kind, settings, version."""

    def documents(self, log: ReadStats) -> Iterator[Document]:
        for path in self.files().values():
            yield from self.read(path, log)

    def fingerprint(self, hashes: FileHashCache) -> str:
        return repr([source_file.content for source_file in self.source_files(hashes)])

    def size_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files().values())

    def source_files(self, hashes: FileHashCache) -> list[SourceFile]:
        files = self.files()
        stamps = list(map(stat_signature, files.values()))
        with ThreadPoolExecutor(min(8, num_cpus())) as pool:  # hashing leaves the interpreter's lock
            digests = list(pool.map(hashes.sha256, files.values()))
        return [
            SourceFile(
                name,
                f"{self.reader_version(path)} {digest}",
                stamp[0],
                partial(_read_as_hashed, self.read, path, stamp),
            )
            for (name, path), digest, stamp in zip(files.items(), digests, stamps, strict=True)
        ]


def _read_as_hashed(
    read: Callable[[Path, ReadStats], Iterator[Document]], path: Path, stamp: list[int], log: ReadStats
) -> Iterator[Document]:
    """The documents of a file that is what it was when it was hashed. Raises OSError where it is another by the end.

    What is encoded is kept by that hash for good.
    """
    yield from read(path, log)
    if stat_signature(path) != stamp:
        raise OSError(f"{path} changed while it was prepared; start again once it is complete")
