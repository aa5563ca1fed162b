import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from components.data.dataset import TokenDataset
from components.data.document import Document, ReadStats
from components.data.file_hash_cache import FileHashCache
from components.data.sources.base import TextSource
from components.tokenizers import Bytes


@pytest.fixture
def texts(reference: Callable[[str], Path]) -> Path:
    """Reference corpora."""
    return reference("text")


@dataclass(kw_only=True)
class Given(TextSource):
    """A source with the documents given by a test; also the smallest example of a custom source."""

    text: tuple[str, ...]

    def documents(self, log: ReadStats) -> Iterator[Document]:
        return map(Document, self.text)

    def fingerprint(self, hashes: FileHashCache) -> str:
        return hashlib.sha256(repr(self.text).encode()).hexdigest()

    def __str__(self) -> str:
        return f"{len(self.text)} given texts"


@pytest.fixture
def packed(tmp_path: Path) -> Callable[[Iterable[str], int], TokenDataset]:
    """A dataset of texts as bytes."""

    def build(text: Iterable[str], sequence_length: int) -> TokenDataset:
        return Given(text=tuple(text)).build(
            tokenizer=Bytes().build(), sequence_length=sequence_length, cache_dir=tmp_path / "cache", progress=print
        )

    return build
