"""The cache of prepared data: a source of text is tokenized into it on first use, and opened from it after that.

    <cache_dir>/
        file-hashes.json         what is in files that did not change (file_hash_cache.py)
        encoded-<tokenizer>/     shards of token ids (shards.py), shared by all data sets of a tokenizer
        TextFiles-<content>/     a data set: which documents of which shards, in which order (index.py)

Names are derived from content, settings and tokenizer, so an entry never has to be invalidated.
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
from components.data.file_hash_cache import MEMORY, FileHashCache
from components.data.index import INDEX, PIECES, SEGMENTS, DocumentFilter, Index, open_index, write_index
from components.data.shards import FORMAT, read_record, store_name
from components.data.tokenize import Preparation, tokenize_missing
from components.interfaces import Tokenizer


@dataclass(frozen=True)
class CacheEntry:
    """A data set in `cache_dir`, existing or not: the documents of `pieces` that `selection` takes, as token ids."""

    cache_dir: Path
    tokenizer: Tokenizer
    kind: str
    """Class of the source; the name of the directory begins with it."""
    source: str
    """The source, to display."""
    pieces: Sequence[SourceFile]
    selection: DocumentFilter

    @cached_property
    def content(self) -> str:
        """Fingerprint of the text and of what is taken of it."""
        text = hashlib.sha256(repr([piece.content for piece in self.pieces]).encode()).hexdigest()
        return f"{text} {self.selection.model_dump_json()}"

    @cached_property
    def directory(self) -> Path:
        key = hashlib.sha256(f"{FORMAT}\0{self.content}\0{self.tokenizer.fingerprint}".encode()).hexdigest()
        return self.cache_dir / f"{self.kind}-{key[:20]}"

    def is_prepared(self) -> bool:
        """Return whether all that `open` needs exists. Raises ValueError where the directory holds other text."""
        if not self.directory.exists():
            return False
        index = read_record(self.directory / INDEX, Index)
        if index.content != self.content:
            raise ValueError(f"{self.directory} holds other text than its name says; delete it to prepare it anew")
        return all((self.cache_dir / index.store / shard).is_dir() for shard in index.shards)

    def prepare(self, report: Callable[[Preparation], None], report_seconds: float) -> bool:
        """Tokenize what is missing and write the index; return False if everything was there already."""
        if self.is_prepared():
            return False
        store = store_name(self.tokenizer)
        encoded = tokenize_missing(
            self.pieces,
            self.cache_dir / store,
            tokenizer=self.tokenizer,
            source=self.source,
            report=report,
            report_seconds=report_seconds,
        )
        # What exists now may be another process's, which is using it already.
        if self.directory.exists() and not self.is_prepared():
            remove_atomic(self.directory, (INDEX, SEGMENTS, PIECES))
        write_index(
            self.directory,
            [(piece.name, encoded[piece.content]) for piece in self.pieces],
            source=self.source,
            content=self.content,
            tokenizer=self.tokenizer,
            store=store,
            selection=self.selection,
        )
        return True

    def open(self, sequence_length: int) -> TextDataset:
        """Open the prepared data set, verified. Raises ValueError for a damaged file, with the remedy."""
        with FileHashCache(self.cache_dir / MEMORY) as hashes:
            index, segments = open_index(self.directory, tokenizer=self.tokenizer, hashes=hashes)
        return TextDataset(self.directory, index, segments, sequence_length)
