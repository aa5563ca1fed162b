"""Token ids in files, read where they lie: nothing is held in memory but what was asked for.

Files of ids are read, not mapped: pages of a map would count as memory of the process, and a disk that fails or a file
that is cut short would end the process by a signal, where a read says what happened. The table of segments, which is
looked up at random, may be mapped.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

_MOST_OPEN = 128
"""Files held open at a time; systems allow 256 and more."""
_STRIDE = 256
"""Segments of which one start is held in memory; the others are added up where they are asked for."""


@dataclass(frozen=True)
class _Mapped:
    """A mapped .npy file, to pickle in place of its content."""

    path: str

    @classmethod
    def of(cls, table: np.ndarray) -> _Mapped | np.ndarray:
        return cls(table.filename) if isinstance(table, np.memmap) and table.filename else table

    def open(self) -> np.ndarray:
        table: np.ndarray = np.load(self.path, mmap_mode="r", allow_pickle=False)
        return table


class StoredTokens:
    """Runs of ids from several files, end to end. Pickling carries paths, never tokens or open files."""

    def __init__(self, files: Sequence[Path], dtype: np.dtype, segments: np.ndarray):
        """`segments` (n, 3 or more) int64: number of the file, first id in it, ids."""
        self._files = list(files)
        self._dtype = dtype
        self.segments = np.asanyarray(segments, dtype=np.int64)
        # Of every _STRIDE-th segment where it starts in the whole; then the end.
        sums = [int(segments[at : at + _STRIDE, 2].sum()) for at in range(0, len(segments), _STRIDE)]
        self._starts = list(accumulate(sums, initial=0))
        self._open: OrderedDict[int, int] = OrderedDict()  # file -> descriptor, the one used last at the end

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out` (n,) with the ids from `start` on.

        Raises OSError, naming the file, where it cannot be read or is shorter than it was.
        """
        segment, skipped = self.segment_at(start)
        segments = self.segments.data  # a memory view gives Python's numbers, quickly
        done = 0
        while done < len(out):
            file, first, count = segments[segment, 0], segments[segment, 1], segments[segment, 2]
            part = self._read(file, first + skipped, min(count - skipped, len(out) - done))
            out[done : done + len(part)] = part
            done += len(part)
            segment, skipped = segment + 1, 0

    def segment_at(self, position: int) -> tuple[int, int]:
        """(segment, position within it) of the id at `position`."""
        block = bisect_right(self._starts, position) - 1
        ends = self.segments[block * _STRIDE : (block + 1) * _STRIDE, 2].cumsum()
        within = position - self._starts[block]
        number = int(ends.searchsorted(within, side="right"))
        return block * _STRIDE + number, within - (int(ends[number - 1]) if number else 0)

    def _read(self, file: int, first: int, count: int) -> np.ndarray:
        size = self._dtype.itemsize
        try:
            data = os.pread(self._descriptor(file), count * size, first * size)
            while data and len(data) < count * size:  # cut short by a signal
                more = os.pread(self._descriptor(file), count * size - len(data), first * size + len(data))
                if not more:
                    break
                data += more
        except OSError as error:
            raise OSError(error.errno, f"cannot read the data ({error.strerror})", str(self._files[file])) from None
        if len(data) < count * size:
            raise OSError(
                f"{self._files[file]} was truncated while it was in use: it has {os.fstat(self._open[file]).st_size:,} "
                f"bytes, and the data goes on to byte {(first + count) * size:,}"
            )
        return np.frombuffer(data, dtype=self._dtype)

    def _descriptor(self, file: int) -> int:
        if file in self._open:
            self._open.move_to_end(file)
            return self._open[file]
        if len(self._open) >= _MOST_OPEN:
            os.close(self._open.popitem(last=False)[1])
        self._open[file] = os.open(self._files[file], os.O_RDONLY)
        return self._open[file]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict(), "segments": _Mapped.of(self.segments)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self.segments, _Mapped):
            self.segments = self.segments.open()

    def __del__(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])
