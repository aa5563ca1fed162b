"""IncrementalDetokenizer: decodes ids as they are generated, holding back the bytes of incomplete characters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"
"""A decoder returns it for bytes that are not, or not yet, a character."""
_MAX_BYTES = 4
"""Bytes of a character in UTF-8, and so the most ids of one."""


class IncrementalDetokenizer:
    """Decodes a growing sequence of ids: the results of `add` and `finish`, joined, are the text of all ids."""

    def __init__(self, decode: Callable[[Sequence[int]], str], before: Sequence[int] = ()) -> None:
        """`before` are the ids of the preceding text, because some tokenizers drop the space of the first token."""
        self._decode = decode
        self._ids = self._last_character(before)
        """The last ids, which may affect the text of the next one."""
        self._num_returned = len(self._text(self._ids))
        """Number of characters of their text that were returned or precede the text."""
        self._num_new = 0
        """Number of ids added since the text was last complete."""

    def add(self, id: int) -> str:
        """Add `id` and return the text that cannot change any more."""
        self._ids.append(id)
        self._num_new += 1
        text = self._text(self._ids)
        # Decoders return one replacement character for the bytes of an incomplete character. Those of SentencePiece
        # return one for each byte of the run of byte tokens, also for complete characters before the incomplete one.
        stable = text.rstrip(_REPLACEMENT)
        new = self._unreturned(stable)
        if stable == text:
            self._ids = self._ids[-self._num_new :]
            self._num_returned = len(self._text(self._ids))
            self._num_new = 0
        return new

    def finish(self) -> str:
        """Return the text that was held back."""
        return self._unreturned(self._text(self._ids))

    def _unreturned(self, text: str) -> str:
        new = text[self._num_returned :]
        self._num_returned = max(self._num_returned, len(text))
        return new

    def _last_character(self, before: Sequence[int]) -> list[int]:
        """Return the fewest ids at the end whose text starts with a whole character; if there are none, the last id."""
        for count in range(1, _MAX_BYTES + 1):
            if not self._text(before[-count:]).startswith(_REPLACEMENT):
                return list(before[-count:])
        return list(before[-1:])

    def _text(self, ids: Sequence[int]) -> str:
        try:
            return self._decode(ids)
        except ValueError:  # an id without a token, in a gap between ranks
            return _REPLACEMENT if len(ids) == 1 else "".join(self._text([id]) for id in ids)
