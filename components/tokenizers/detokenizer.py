"""Ids to text while they come in, a character at a time: bytes of an unfinished one are held back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_BROKEN = "\ufffd"
"""What a decoder makes of bytes that are no character, or not yet."""
_MOST_BYTES = 4
"""Of a character in UTF-8, and so the most ids that one takes."""


class IncrementalDetokenizer:
    """The text of one growing sequence of ids; what `push` and `finish` return, joined, is what decoding all gives."""

    def __init__(self, decode: Callable[[Sequence[int]], str], before: Sequence[int] = ()) -> None:
        """`before` are the ids of the text that is continued: some tokenizers drop the space of a first token."""
        self._decode = decode
        self._ids = self._last_character(before)
        """Those that may still matter to the text of the next."""
        self._shown = len(self._text(self._ids))
        """Characters of their text that were returned."""
        self._new = 0
        """How many of them came since the text was last certain to its end."""

    def add(self, id: int) -> str:
        """The text that became certain with `id`."""
        self._ids.append(id)
        self._new += 1
        text = self._text(self._ids)
        # Of bytes that more bytes may complete, decoders make one broken character, and those of SentencePiece one for
        # each byte of the run of them, also of those that were whole characters without the last.
        certain = text.rstrip(_BROKEN)
        new = self._since(certain)
        if certain == text:
            self._ids = self._ids[-self._new :]
            self._shown = len(self._text(self._ids))
            self._new = 0
        return new

    def finish(self) -> str:
        """What was held back."""
        return self._since(self._text(self._ids))

    def _since(self, text: str) -> str:
        new = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return new

    def _last_character(self, before: Sequence[int]) -> list[int]:
        """The fewest ids at the end that begin with a whole character; of bytes that are none, the last."""
        for count in range(1, _MOST_BYTES + 1):
            if not self._text(before[-count:]).startswith(_BROKEN):
                return list(before[-count:])
        return list(before[-1:])

    def _text(self, ids: Sequence[int]) -> str:
        try:
            return self._decode(ids)
        except ValueError:  # an id that stands for nothing: a hole between ranks
            return "".join(self._one(id) for id in ids)

    def _one(self, id: int) -> str:
        try:
            return self._decode([id])
        except ValueError:
            return _BROKEN
