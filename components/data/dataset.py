"""Datasets: the token ids of all documents, concatenated and cut into sequences of a fixed length."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from components.data.document_index import SOURCE_FILES, FileCounts, Index
from components.data.shards import DOCUMENTS, TOKENS, read_documents, read_record, rebuild_error
from components.data.token_reader import TokenReader


class TokenDataset:
    """Sequence i is tokens [i*T, i*T + T + 1) of the concatenated documents, where T is `sequence_length`.

    Neighboring sequences share one token, the last target of one and the first input of the next, so every token but
    the first is a target exactly once. Fewer than T tokens at the end are dropped.
    """

    fingerprint: str | None = None
    """Hash of the content, independent of its location; None if it is not known."""

    def __init__(self, reader: TokenReader, *, sequence_length: int, vocab_size: int, source: str):
        """`source` is a name for display. Raises ValueError if there is not a single whole sequence."""
        if sequence_length < 1:
            raise ValueError(f"sequence_length = {sequence_length}: expected an integer >= 1")
        self.reader = reader
        self.sequence_length = sequence_length
        self.vocab_size = vocab_size
        self.source = source
        self._length = (len(reader) - 1) // sequence_length
        if self._length < 1:
            raise ValueError(
                f"{source} holds {len(reader):,} tokens; one sequence needs sequence_length + 1 = "
                f"{sequence_length + 1:,}. Use a shorter sequence_length or more text"
            )

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Tensor:
        """Return (T+1,) int64 token ids."""
        return self.__getitems__((index,))[0]

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """Return (n, T+1) int64 token ids: the sequences of `indices`, in their order."""
        width = self.sequence_length + 1
        rows = np.empty((len(indices), width), dtype=np.int64)
        for row, index in zip(rows, indices, strict=True):
            if not 0 <= index < self._length:
                raise IndexError(f"index {index} is out of range for {self._length} sequences")
            self.reader.read(int(index) * self.sequence_length, row)
        if rows.size and int(rows.view(np.uint64).max()) >= self.vocab_size:  # as uint64, negative ids are the largest
            wrong = rows.flat[rows.view(np.uint64).argmax()]
            raise ValueError(
                f"{self.source}: token id {wrong} is outside the vocabulary of {self.vocab_size}; the files have "
                "changed, or were made with another tokenizer"
            )
        return torch.from_numpy(rows)

    def tokens(self, start: int, count: int) -> np.ndarray:
        """Return (count,) int64: `count` token ids of the concatenated documents from position `start`."""
        ids = np.empty(count, dtype=np.int64)
        self.reader.read(start, ids)
        return ids

    def describe(self, index: int) -> str:
        """Return where sequence `index` comes from, for display."""
        return f"{self.source}, sequence {index}"


class TextDataset(TokenDataset):
    """The sequences of a prepared data set, with access to its documents."""

    def __init__(self, directory: Path, index: Index, spans: np.ndarray, sequence_length: int):
        """`index` and `spans` are the verified result of `open_index`."""
        self.directory = directory
        self.index = index
        self.fingerprint = hashlib.sha256(index.content.encode()).hexdigest()[:16]
        self._shards = [directory.parent / index.store / shard for shard in index.shards]
        reader = TokenReader([shard / TOKENS for shard in self._shards], np.dtype(index.dtype).newbyteorder("<"), spans)
        super().__init__(reader, sequence_length=sequence_length, vocab_size=index.vocab_size, source=index.source)

    def document_lengths(self) -> np.ndarray:
        """Return (documents, 2) int64: tokens, including start and end tokens, and bytes of text of each document."""
        rows = [self._documents(span) for span in range(len(self.reader.spans))]
        return np.stack([np.concatenate([part[name] for part in rows]) for name in ("tokens", "bytes")], axis=1)

    def locate(self, position: int) -> str:
        """Return the source file and its document that the token at `position` of all documents comes from."""
        span, offset = self.reader.span_at(position)
        ends = np.cumsum(self._documents(span)["tokens"])
        within = int(np.searchsorted(ends, offset, side="right"))
        number = int(self.reader.spans[:span, 4].sum()) + within
        source_files = read_record(self.directory / SOURCE_FILES, FileCounts).root
        starts = [0, *accumulate(count for _, count in source_files)]
        if starts[-1] != self.index.documents:
            raise ValueError(rebuild_error(self.directory / SOURCE_FILES, "does not belong to its index"))
        source_file = int(np.searchsorted(starts, number, side="right")) - 1
        token = offset - (int(ends[within - 1]) if within else 0)
        return f"{source_files[source_file][0]} document {number - starts[source_file]} token {token}"

    def describe(self, index: int) -> str:
        """Return the first and last token of sequence `index` with their documents, for display."""
        start = index * self.sequence_length
        return f"{self.locate(start)} to {self.locate(start + self.sequence_length)}"

    def _documents(self, span: int) -> np.ndarray:
        shard, _, tokens, first, count = self.reader.spans[span].tolist()
        rows = read_documents(self._shards[shard], first, count)
        if int(rows["tokens"].sum()) != tokens:
            raise ValueError(rebuild_error(self._shards[shard] / DOCUMENTS, "does not belong to its index"))
        return rows
