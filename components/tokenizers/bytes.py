"""Byte-level tokenizer: an id is a byte, so no training is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from components.unicode_text import replace_surrogates

_END = 256


@dataclass(kw_only=True)
class Bytes:
    """UTF-8 bytes as ids 0..255 and 256 as the end of a document: a vocabulary of 257."""

    def build(self) -> ByteEncoder:
        return ByteEncoder()


class ByteEncoder:
    """Encodes text to its UTF-8 bytes; lone surrogates, which UTF-8 cannot represent, become U+FFFD."""

    vocab_size = 257
    end_of_document = _END
    fingerprint = "bytes-1"

    @property
    def byte_lengths(self) -> np.ndarray:
        """(257,) int64: 1 for every id except the end of a document, which is 0."""
        lengths = np.ones(self.vocab_size, dtype=np.int64)
        lengths[_END] = 0
        return lengths

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the (bytes,) uint16 ids of each text, without the end of document."""
        return [np.frombuffer(replace_surrogates(text).encode(), dtype=np.uint8).astype(np.uint16) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; the end of a document becomes `<|endoftext|>`.

        Raises ValueError for an id outside the vocabulary.
        """
        parts = []
        for token in ids:
            if not 0 <= token <= _END:
                raise ValueError(f"id {token} is outside the byte vocabulary of {self.vocab_size}")
            parts.append(b"<|endoftext|>" if token == _END else bytes((token,)))
        return b"".join(parts).decode("utf-8", errors="replace")

    def hugging_face(self) -> Any:
        """Return the same encoding as a `tokenizers.Tokenizer`. Raises ValueError if the library is missing."""
        from components.tokenizers.hf_conversion import to_hugging_face

        return to_hugging_face({bytes((byte,)): byte for byte in range(256)}, None, {"<|endoftext|>": _END})
