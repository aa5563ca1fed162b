"""Prepared shards as fixed-length sequences, read through a memory map."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from components.data.shards import DOCUMENT_DTYPE, Index, documents_file, tokens_file


class PackedTokens:
    """Sequence i is tokens [i*T, i*T + T + 1) of all documents end to end, T being `sequence_length`.

    Neighbours share one token, the last target of one and the first input of the next, so every token but the very
    first is a target exactly once; what is left over at the end, fewer than T tokens, is not used. Each process maps
    the files for itself: pickling carries paths, never tokens.
    """

    def __init__(self, directory: Path, index: Index, sequence_length: int):
        """`index` is that of `directory`, already verified. Raises ValueError if there is not one whole sequence."""
        if sequence_length < 1:
            raise ValueError(f"sequence_length = {sequence_length}: expected at least 1")
        self.directory = directory
        self.index = index
        self.sequence_length = sequence_length
        self._length = (index.tokens - 1) // sequence_length
        if self._length < 1:
            raise ValueError(
                f"{index.source} holds {index.tokens:,} tokens, which is not one sequence of sequence_length + 1 = "
                f"{sequence_length + 1:,}; use a shorter sequence_length or more text"
            )
        self._starts = [
            0,
            *accumulate(shard.tokens for shard in index.shards),
        ]  # of each shard in the whole; then the end
        self._maps: list[np.ndarray] | None = None

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
            self._read(int(index) * self.sequence_length, row)
        if rows.size and int(rows.max()) >= self.index.vocab_size:
            raise ValueError(
                f"{self.directory}: token id {rows.max()} is outside the vocabulary of {self.index.vocab_size}; "
                "delete the directory to prepare it anew"
            )
        return torch.from_numpy(rows)

    def document_lengths(self) -> np.ndarray:
        """(documents, 2) int64: tokens with the end token, and bytes of text, of each document in order."""
        parts = [
            np.fromfile(self.directory / documents_file(shard.number), dtype=DOCUMENT_DTYPE, count=shard.documents * 2)
            for shard in self.index.shards
        ]
        return np.concatenate(parts).astype(np.int64, copy=False).reshape(-1, 2)

    def tokens(self, start: int, count: int) -> np.ndarray:
        """(count,) int64: the ids from number `start` of all documents end to end on."""
        ids = np.empty(count, dtype=np.int64)
        self._read(start, ids)
        return ids

    def _read(self, start: int, out: np.ndarray) -> None:
        """Fill `out` (n,) with the tokens from `start` on, across shards where need be."""
        maps = self._mapped()
        shard = bisect_right(self._starts, start) - 1
        done = 0
        while done < len(out):
            offset = start + done - self._starts[shard]
            part = maps[shard][offset : offset + len(out) - done]
            out[done : done + len(part)] = part
            done += len(part)
            shard += 1

    def _mapped(self) -> list[np.ndarray]:
        if self._maps is None:
            self._maps = [
                np.memmap(
                    self.directory / tokens_file(shard.number),
                    dtype=self.index.token_dtype,
                    mode="r",
                    shape=(shard.tokens,),
                )
                for shard in self.index.shards
            ]
        return self._maps

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": None}
