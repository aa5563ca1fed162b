"""What a source of text yields: documents, and notes of what was read and fixed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple


class Document(NamedTuple):
    """A document, or a part of one that is too large to hold whole."""

    text: str
    complete: bool = True
    """False if the next one continues this document."""


@dataclass
class ReadStats:
    """What a source came across while its documents were read."""

    source_bytes: int = 0
    """Bytes of the source read so far, as stored (compressed where it is); drives the progress bar."""
    repairs: Counter[str] = field(default_factory=Counter)
    """What was found and put right, by name: "replaced characters", "line ends", ..."""


@dataclass(frozen=True)
class SourceFile:
    """A part of a source that is prepared by itself, once: a file, or all of a source that has no files."""

    name: str
    """For people: the path within the source."""
    content: str
    """Text that changes whenever `read` could yield anything else."""
    size_bytes: int
    """Bytes that `log.source_bytes` will have grown by; 0 if unknown."""
    read: Callable[[ReadStats], Iterator[Document]]
    """The documents, in an order that does not change. Can be pickled if other processes are to share the work."""


def to_utf8(text: str, log: ReadStats) -> tuple[str, bytes]:
    """Text that UTF-8 can hold, and its bytes: a lone surrogate (JSON can spell one) becomes U+FFFD, counted."""
    try:
        return text, text.encode()
    except UnicodeEncodeError:
        repaired = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        log.repairs["replaced characters"] += repaired.count("\ufffd") - text.count("\ufffd")
        return repaired, repaired.encode()
