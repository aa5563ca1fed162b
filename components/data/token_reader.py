"""Token ids in files, read where they lie: nothing is held in memory but what was asked for.

Files of ids are read, not mapped: pages of a map would count as memory of the process, and a disk that fails or a file
that is cut short would end the process by a signal, where a read says what happened. The table of spans, which is
looked up at random, may be mapped.
"""

from __future__ import annotations

import errno
import os
import resource
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, count
from pathlib import Path
from typing import Any

import numpy as np

_MOST_OPEN = 512
_FEWEST_FREE = 32
"""Half of what is free is left to the rest of the process: a checkpoint, batches of workers, connections of ranks."""


class _OpenFiles:
    """The descriptors of all sources of this process, of which those used last are kept.

    The limit is the system's for the process, not for a source: a mixture has many.
    """

    def __init__(self) -> None:
        # (source, file) -> descriptor, the one used last at the end
        self._open: OrderedDict[tuple[int, int], int] = OrderedDict()
        self._most: int | None = None

    def check_limit(self) -> None:
        """Raise OSError where the process may not open one more file; nothing is opened for it."""
        if self._most is None:
            allowed, in_use = resource.getrlimit(resource.RLIMIT_NOFILE)[0], _descriptors_in_use()
            free = 2 * _MOST_OPEN if allowed == resource.RLIM_INFINITY else allowed - in_use
            if free < _FEWEST_FREE:
                raise OSError(
                    f"this process may have {allowed} files open and has {in_use} already; to train it takes "
                    f"{_FEWEST_FREE} more. Raise the limit: ulimit -n 1024"
                )
            self._most = min(free // 2, _MOST_OPEN)

    def descriptor(self, source: int, file: int, path: Path) -> int:
        key = source, file
        if key in self._open:
            self._open.move_to_end(key)
            return self._open[key]
        self.check_limit()
        while len(self._open) >= (self._most or 1):
            self._close_oldest()
        while True:
            try:
                self._open[key] = os.open(path, os.O_RDONLY)
                return self._open[key]
            except OSError as error:
                # others have opened files since the limit was taken: give back what is held, before anything fails
                if error.errno != errno.EMFILE or not self._open:
                    raise
                self._close_oldest()
                self._most = max(1, len(self._open))

    def close(self, source: int) -> None:
        for key in [key for key in self._open if key[0] == source]:
            os.close(self._open.pop(key))

    def _close_oldest(self) -> None:
        os.close(self._open.popitem(last=False)[1])


def _descriptors_in_use() -> int:
    for folder in ("/proc/self/fd", "/dev/fd"):
        with suppress(OSError):
            return len(list(Path(folder).iterdir()))
    return 0


_files = _OpenFiles()
_source_numbers = count()

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


class TokenReader:
    """Runs of ids from several files, end to end. Pickling carries paths, never tokens or open files."""

    def __init__(self, files: Sequence[Path], dtype: np.dtype, spans: np.ndarray):
        """`spans` (n, 3 or more) int64: number of the file, first id in it, ids.

        Raises OSError where the process may open no more files.
        """
        self._files = list(files)
        self._dtype = dtype
        self.spans = np.asanyarray(spans, dtype=np.int64)
        # Of every _STRIDE-th span where it starts in the whole; then the end.
        sums = [int(spans[at : at + _STRIDE, 2].sum()) for at in range(0, len(spans), _STRIDE)]
        self._starts = list(accumulate(sums, initial=0))
        self._number = next(_source_numbers)
        _files.check_limit()

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out` (n,) with the ids from `start` on.

        Raises OSError, naming the file, where it cannot be read or is shorter than it was.
        """
        span, skipped = self.span_at(start)
        spans = self.spans.data  # a memory view gives Python's numbers, quickly
        done = 0
        while done < len(out):
            file, first, count = spans[span, 0], spans[span, 1], spans[span, 2]
            part = self._read(file, first + skipped, min(count - skipped, len(out) - done))
            out[done : done + len(part)] = part
            done += len(part)
            span, skipped = span + 1, 0

    def span_at(self, position: int) -> tuple[int, int]:
        """(span, position within it) of the id at `position`."""
        block = bisect_right(self._starts, position) - 1
        ends = self.spans[block * _STRIDE : (block + 1) * _STRIDE, 2].cumsum()
        within = position - self._starts[block]
        number = int(ends.searchsorted(within, side="right"))
        return block * _STRIDE + number, within - (int(ends[number - 1]) if number else 0)

    def _read(self, file: int, first: int, count: int) -> np.ndarray:
        size = self._dtype.itemsize
        try:
            descriptor = _files.descriptor(self._number, file, self._files[file])
            data = os.pread(descriptor, count * size, first * size)
            while data and len(data) < count * size:  # cut short by a signal
                more = os.pread(descriptor, count * size - len(data), first * size + len(data))
                if not more:
                    break
                data += more
        except OSError as error:
            raise OSError(error.errno, f"cannot read the data ({error.strerror})", str(self._files[file])) from None
        if len(data) < count * size:
            raise OSError(
                f"{self._files[file]} was truncated while it was in use: it has {os.fstat(descriptor).st_size:,} "
                f"bytes, and the data goes on to byte {(first + count) * size:,}"
            )
        return np.frombuffer(data, dtype=self._dtype)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"spans": _Mapped.of(self.spans)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._number = next(_source_numbers)  # that of another process may be taken in this one
        if isinstance(self.spans, _Mapped):
            self.spans = self.spans.open()

    def __del__(self) -> None:
        if hasattr(self, "_number"):
            _files.close(self._number)
