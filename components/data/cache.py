"""The cache of prepared data: a text source is tokenized into it on first use, and later opened from it.

    <cache_dir>/
        file-hashes.json         SHA-256 of unchanged source files (file_hash_cache.py)
        encoded-<tokenizer>/     shards of token ids (shards.py), shared by all data sets with the same tokenizer
        TextFiles-<content>/     a data set: its documents in the shards, in order (document_index.py)

Names are hashes of content, settings and tokenizer, so an entry never has to be invalidated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from components.atomic_files import remove_atomic
from components.data.dataset import TextDataset
from components.data.document import SourceFile
from components.data.document_index import INDEX, SOURCE_FILES, SPANS, DocumentFilter, Index, open_index, write_index
from components.data.file_hash_cache import HASH_CACHE_FILE, FileHashCache
from components.data.shards import FORMAT, read_record, store_name
from components.data.tokenize import Preparation, tokenize_missing
from components.interfaces import Tokenizer


@dataclass(frozen=True)
class CacheEntry:
    """A data set in `cache_dir`, prepared or not: the documents of `source_files` that pass `document_filter`."""

    cache_dir: Path
    tokenizer: Tokenizer
    kind: str
    """Class name of the source, the prefix of the directory name."""
    source: str
    """The source, for display."""
    source_files: Sequence[SourceFile]
    document_filter: DocumentFilter

    @cached_property
    def content(self) -> str:
        """Fingerprint of the text and of the document filter."""
        text = hashlib.sha256(repr([source_file.content for source_file in self.source_files]).encode()).hexdigest()
        return f"{text} {self.document_filter.model_dump_json()}"

    @cached_property
    def directory(self) -> Path:
        """The directory of the data set in `cache_dir`."""
        key = hashlib.sha256(f"{FORMAT}\0{self.content}\0{self.tokenizer.fingerprint}".encode()).hexdigest()
        return self.cache_dir / f"{self.kind}-{key[:20]}"

    def is_prepared(self) -> bool:
        """Return whether all files that `open` needs exist. Raises ValueError if the directory holds other text."""
        if not self.directory.exists():
            return False
        index = read_record(self.directory / INDEX, Index)
        if index.content != self.content:
            raise ValueError(
                f"{self.directory} holds other text than its name says; delete it to prepare the data again"
            )
        return all((self.cache_dir / index.store / shard).is_dir() for shard in index.shards)

    def prepare(self, report: Callable[[Preparation], None], report_seconds: float) -> bool:
        """Tokenize the missing files and write the index. Returns False if the data set was already prepared."""
        if self.is_prepared():
            return False
        store = store_name(self.tokenizer)
        encoded = tokenize_missing(
            self.source_files,
            self.cache_dir / store,
            tokenizer=self.tokenizer,
            source=self.source,
            report=report,
            report_seconds=report_seconds,
        )
        # Another process may have prepared the data set meanwhile, and may be reading it.
        if self.directory.exists() and not self.is_prepared():
            remove_atomic(self.directory, (INDEX, SPANS, SOURCE_FILES))
        write_index(
            self.directory,
            [(source_file.name, encoded[source_file.content]) for source_file in self.source_files],
            source=self.source,
            content=self.content,
            tokenizer=self.tokenizer,
            store=store,
            document_filter=self.document_filter,
        )
        return True

    def open(self, sequence_length: int) -> TextDataset:
        """Return the prepared data set after verifying it. Raises ValueError for a damaged file, with the remedy."""
        with FileHashCache(self.cache_dir / HASH_CACHE_FILE) as hashes:
            index, spans = open_index(self.directory, tokenizer=self.tokenizer, hashes=hashes)
        return TextDataset(self.directory, index, spans, sequence_length)
