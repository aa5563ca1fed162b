"""Documents, the files they come from, and statistics of reading them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from components.unicode_text import replace_surrogates


class Document(NamedTuple):
    """A document, or a part of one that is too large to hold in memory at once."""

    text: str
    complete: bool = True
    """False if the next item continues this document."""


@dataclass
class ReadStats:
    """Statistics that a source updates while its documents are read."""

    source_bytes: int = 0
    """Bytes of the source read so far, compressed bytes for compressed files; used to report progress."""
    fixups: Counter[str] = field(default_factory=Counter)
    """Number of fixes of the text by kind: "replaced characters", "line ends", ..."""


@dataclass(frozen=True)
class SourceFile:
    """A part of a source that is tokenized independently: a file, or the whole of a source without files."""

    name: str
    """The path within the source, for display."""
    content: str
    """A fingerprint that changes whenever `read` could yield other documents."""
    size_bytes: int
    """Bytes by which `read` increases `ReadStats.source_bytes`; 0 if unknown."""
    read: Callable[[ReadStats], Iterator[Document]]
    """Yields the documents in a fixed order. It must be picklable to be run in other processes."""


def to_utf8(text: str, log: ReadStats) -> tuple[str, bytes]:
    """Return `text` and its UTF-8 bytes. Lone surrogates become U+FFFD and are counted."""
    try:
        return text, text.encode()
    except UnicodeEncodeError:
        repaired = replace_surrogates(text)
        log.fixups["replaced characters"] += repaired.count("\ufffd") - text.count("\ufffd")
        return repaired, repaired.encode()
