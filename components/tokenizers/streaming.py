"""Ids to text while they come in, a character at a time: bytes of an unfinished one are held back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_BROKEN = "\ufffd"
"""What a decoder makes of bytes that are no character, or not yet."""


class TextStream:
    """The text of one growing sequence of ids; what `push` and `finish` return, joined, is what decoding all gives."""

    def __init__(self, decode: Callable[[Sequence[int]], str], before: Sequence[int] = ()) -> None:
        """`before` are the ids of the text that is continued: some tokenizers drop the space of a first token."""
        self._decode = decode
        self._ids = list(before[-1:])
        """Those that may still matter to the text of the next."""
        self._shown = len(self._text())
        """Characters of their text that were returned."""

    def push(self, id: int) -> str:
        """The text that became certain with `id`."""
        self._ids.append(id)
        text = self._text()
        # Of bytes that more bytes may complete, a decoder makes exactly one broken character, the last.
        unfinished = text.endswith(_BROKEN)
        new = self._since(text[:-1] if unfinished else text)
        if not unfinished:
            self._ids = [id]
            self._shown = len(self._text())
        return new

    def finish(self) -> str:
        """What was held back."""
        return self._since(self._text())

    def _since(self, text: str) -> str:
        new = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return new

    def _text(self) -> str:
        try:
            return self._decode(self._ids)
        except ValueError:  # an id that stands for nothing: a hole between ranks
            return "".join(self._one(id) for id in self._ids)

    def _one(self, id: int) -> str:
        try:
            return self._decode([id])
        except ValueError:
            return _BROKEN
