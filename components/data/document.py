"""What a source yields and what preparing asks of a tokenizer: the two sides that meet in prepare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np


class Document(NamedTuple):
    """A document, or a part of one that is too large to hold whole."""

    text: str
    complete: bool = True
    """False if the next one continues this document."""


@dataclass
class ReadingLog:
    """What a source came across while its documents were read."""

    source_bytes: int = 0
    """Bytes of the source read so far, as stored (compressed where it is); drives the progress bar."""
    repairs: Counter[str] = field(default_factory=Counter)
    """What was found and put right, by name: "replaced characters", "line ends", "empty documents", ..."""


class EncodesText(Protocol):
    """A tokenizer, as far as preparing needs one."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def end_of_document(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...
