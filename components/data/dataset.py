"""From shards to sequences: token ids end to end, packed into sequences of a fixed length."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from components.data.index import PIECES, Index, Pieces
from components.data.shards import DOCUMENT_DTYPE, DOCUMENTS, TOKENS, read_record, rebuild_error
from components.data.token_reader import TokenReader


class TokenDataset:
    """Sequence i is tokens [i*T, i*T + T + 1) of all documents end to end, T being `sequence_length`.

    Neighbours share one token, the last target of one and the first input of the next, so every token but the very
    first is a target exactly once; what is left over at the end, fewer than T tokens, is not used.
    """

    def __init__(self, stored: TokenReader, *, sequence_length: int, vocab_size: int, source: str):
        """`source` names it for people. Raises ValueError if there is not one whole sequence."""
        if sequence_length < 1:
            raise ValueError(f"sequence_length = {sequence_length}: expected at least 1")
        self.stored = stored
        self.sequence_length = sequence_length
        self.vocab_size = vocab_size
        self.source = source
        self._length = (len(stored) - 1) // sequence_length
        if self._length < 1:
            raise ValueError(
                f"{source} holds {len(stored):,} tokens, which is not one sequence of sequence_length + 1 = "
                f"{sequence_length + 1:,}; use a shorter sequence_length or more text"
            )

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Tensor:
        """(T+1,) int64"""
        return self.__getitems__((index,))[0]

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """(n, T+1) int64: the sequences of `indices`, in their order."""
        width = self.sequence_length + 1
        rows = np.empty((len(indices), width), dtype=np.int64)
        for row, index in zip(rows, indices, strict=True):
            if not 0 <= index < self._length:
                raise IndexError(f"sequence {index} of {self._length}")
            self.stored.read(int(index) * self.sequence_length, row)
        if rows.size and int(rows.view(np.uint64).max()) >= self.vocab_size:  # a negative one is the largest of all
            wrong = rows.flat[rows.view(np.uint64).argmax()]
            raise ValueError(
                f"{self.source}: token id {wrong} is outside the vocabulary of {self.vocab_size}; the files are not "
                "what they were, or were made with another tokenizer"
            )
        return torch.from_numpy(rows)

    def tokens(self, start: int, count: int) -> np.ndarray:
        """(count,) int64: the ids from number `start` of all documents end to end on."""
        ids = np.empty(count, dtype=np.int64)
        self.stored.read(start, ids)
        return ids

    def describe(self, index: int) -> str:
        """Where sequence `index` comes from, for people."""
        return f"{self.source}, sequence {index}"


class SequencePosition(NamedTuple):
    """A token in its document."""

    piece: str
    """Name of the file, or of the source."""
    document: int
    """Number among the documents of the piece that are used."""
    token: int


class TextDataset(TokenDataset):
    """The sequences of a prepared data set, which knows its documents."""

    def __init__(self, directory: Path, index: Index, segments: np.ndarray, sequence_length: int):
        """What `open_index` gave, so everything is verified already."""
        self.directory = directory
        self.index = index
        self.fingerprint = hashlib.sha256(index.content.encode()).hexdigest()[:16]
        """Of the text, wherever it lies."""
        self._shards = [directory.parent / index.store / shard for shard in index.shards]
        stored = TokenReader([shard / TOKENS for shard in self._shards], index.token_dtype, segments)
        super().__init__(stored, sequence_length=sequence_length, vocab_size=index.vocab_size, source=index.source)

    def document_lengths(self) -> np.ndarray:
        """(documents, 2) int64: tokens with the end token, and bytes of text, of each document in order."""
        rows = [self._documents(segment) for segment in range(len(self.stored.segments))]
        return np.stack([np.concatenate([part[name] for part in rows]) for name in ("tokens", "bytes")], axis=1)

    def place(self, position: int) -> SequencePosition:
        """Where the token at `position`, counted through all documents end to end, comes from."""
        segment, offset = self.stored.segment_at(position)
        ends = np.cumsum(self._documents(segment)["tokens"])
        within = int(np.searchsorted(ends, offset, side="right"))
        number = int(self.stored.segments[:segment, 4].sum()) + within
        pieces = read_record(self.directory / PIECES, Pieces).root
        starts = [0, *accumulate(count for _, count in pieces)]
        if starts[-1] != self.index.documents:
            raise ValueError(rebuild_error(self.directory / PIECES, "does not belong to its index"))
        piece = int(np.searchsorted(starts, number, side="right")) - 1
        token = offset - (int(ends[within - 1]) if within else 0)
        return SequencePosition(pieces[piece][0], number - starts[piece], token)

    def describe(self, index: int) -> str:
        start = index * self.sequence_length
        first, last = self.place(start), self.place(start + self.sequence_length)
        begin = f"{first.piece} document {first.document} token {first.token}"
        return f"{begin} to {last.piece} document {last.document} token {last.token}"

    def _documents(self, segment: int) -> np.ndarray:
        shard, _, _, first, count = self.stored.segments[segment].tolist()
        return np.fromfile(
            self._shards[shard] / DOCUMENTS, DOCUMENT_DTYPE, count=count, offset=first * DOCUMENT_DTYPE.itemsize
        )
