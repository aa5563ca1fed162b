"""What every source of text shares: it prepares itself on first use and opens as packed sequences.

To bring your own, subclass `TextSource` and say two things: how to iterate the documents, and what tells one content
from another.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

from components.data.content import FileHashes
from components.data.document import Document, EncodesText, ReadingLog
from components.data.packed import PackedTokens
from components.data.prepare import Preparation, prepare
from components.data.shards import FORMAT, open_shards, read_index

_LINE_SECONDS = 5.0
MEMORY = "file-hashes.json"


class TextSource(ABC):
    """A [data] section: documents that are tokenised once into `cache_dir` and read from there ever after."""

    @abstractmethod
    def documents(self, log: ReadingLog) -> Iterator[Document]:
        """Every document, in an order that does not change. Count in `log` what is read and put right.

        Raises ValueError or OSError, naming file and line, for what cannot be read. Documents without text may be
        yielded: they are dropped, and counted.
        """

    @abstractmethod
    def fingerprint(self, hashes: FileHashes) -> str:
        """Text that changes whenever `documents` could yield anything else. `hashes` remembers what is in files."""

    def size_bytes(self) -> int:
        """Bytes that `log.source_bytes` will have reached at the end, for the time left; 0 if unknown."""
        return 0

    def build(
        self, *, tokenizer: EncodesText, sequence_length: int, cache_dir: Path, progress: Callable[[str], None]
    ) -> PackedTokens:
        """Prepare on first use, then open, verified. `progress` takes a line every few seconds of preparing.

        With several processes let one build first: the others then find the work done (doing it together is safe, but
        every one of them would tokenise). Raises ValueError or OSError for bad input or damaged shards.
        """
        directory, made = self.prepare(
            tokenizer=tokenizer,
            cache_dir=cache_dir,
            report=lambda state: progress(str(state)),
            report_seconds=_LINE_SECONDS,
        )
        with FileHashes(cache_dir / MEMORY) as hashes:
            index = open_shards(directory, tokenizer=tokenizer, hashes=hashes)
        if made:
            progress(f"prepared {index.source}: {index}")
        return PackedTokens(directory, index, sequence_length)

    def prepare(
        self,
        *,
        tokenizer: EncodesText,
        cache_dir: Path,
        report: Callable[[Preparation], None],
        report_seconds: float,
    ) -> tuple[Path, bool]:
        """The prepared directory in `cache_dir`, and whether it had to be made now."""
        with FileHashes(cache_dir / MEMORY) as hashes:
            content = self.fingerprint(hashes)
        key = hashlib.sha256(f"{FORMAT}\0{content}\0{tokenizer.fingerprint}".encode()).hexdigest()
        directory = cache_dir / f"{type(self).__name__}-{key[:20]}"
        if directory.exists():
            if read_index(directory).content != content:
                raise ValueError(f"{directory} holds other text than its name says; delete it to prepare it anew")
            return directory, False
        log = ReadingLog()
        prepare(
            self.documents(log),
            directory,
            tokenizer=tokenizer,
            source=str(self),
            content=content,
            log=log,
            total_bytes=self.size_bytes(),
            report=report,
            report_seconds=report_seconds,
        )
        return directory, True
