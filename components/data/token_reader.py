"""TokenReader: reads ranges of token ids from files; only the requested ids are in memory.

The files are read, not memory-mapped: mapped pages would count as memory of the process, and a failing disk or a
truncated file would kill the process with a signal, where a read raises an error. The table of spans, which is accessed
at random, may be memory-mapped.
"""

from __future__ import annotations

import errno
import os
import resource
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate, count
from pathlib import Path
from typing import Any

import numpy as np

from components.errors import first_line

_MAX_OPEN = 512
_MIN_FREE = 32
"""The reader uses at most half of the free descriptors: checkpoints, loader workers and connections need others."""


class _OpenFiles:
    """A cache of the most recently used file descriptors of all token readers of this process.

    It is shared because the limit of the system is per process, and a mixture has many readers.
    """

    def __init__(self) -> None:
        # (reader, file) -> descriptor, the most recently used last
        self._open: OrderedDict[tuple[int, int], int] = OrderedDict()
        self._max_open: int | None = None

    def check_limit(self) -> None:
        """Raise OSError if the process cannot open enough files."""
        if self._max_open is None:
            import psutil

            allowed, in_use = resource.getrlimit(resource.RLIMIT_NOFILE)[0], psutil.Process().num_fds()
            free = 2 * _MAX_OPEN if allowed == resource.RLIM_INFINITY else allowed - in_use
            if free < _MIN_FREE:
                raise OSError(
                    f"this process may open {allowed} files and has opened {in_use}; training needs at least "
                    f"{_MIN_FREE} more. Raise the limit: ulimit -n 1024"
                )
            self._max_open = min(free // 2, _MAX_OPEN)

    def descriptor(self, reader: int, file: int, path: Path) -> int:
        """Return a descriptor of `path`, which is file number `file` of the reader; it may be closed by later calls."""
        key = reader, file
        if key in self._open:
            self._open.move_to_end(key)
            return self._open[key]
        self.check_limit()
        while len(self._open) >= (self._max_open or 1):
            self._close_oldest()
        while True:
            try:
                self._open[key] = os.open(path, os.O_RDONLY)
                return self._open[key]
            except OSError as error:
                # others have opened files since the limit was computed: close cached ones
                if error.errno != errno.EMFILE or not self._open:
                    raise
                self._close_oldest()
                self._max_open = max(1, len(self._open))

    def close(self, reader: int) -> None:
        """Close all files of the reader."""
        for key in [key for key in self._open if key[0] == reader]:
            os.close(self._open.pop(key))

    def _close_oldest(self) -> None:
        os.close(self._open.popitem(last=False)[1])


_files = _OpenFiles()
_reader_numbers = count()

_STRIDE = 256
"""The start of every `_STRIDE`-th span is in memory; those between are computed when they are needed."""


def map_array(path: Path) -> np.ndarray:
    """Memory-map an array in a .npy file. Raises ValueError, without the path, for a damaged file."""
    try:
        array: np.ndarray = np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as error:  # the parser of the header raises errors of many kinds
        raise ValueError(first_line(error)) from None
    return array


class TokenReader:
    """Concatenates spans of ids from several files. When pickled, it contains paths, not tokens or open files."""

    def __init__(self, files: Sequence[Path], dtype: np.dtype, spans: np.ndarray):
        """`spans` is (n, 3 or more) int64: index into `files`, first id in the file, number of ids.

        Raises OSError if the process cannot open enough files.
        """
        self._files = list(files)
        self._dtype = dtype
        self.spans = np.asanyarray(spans, dtype=np.int64)
        # Start of every _STRIDE-th span in the concatenation, then its end.
        sums = [int(spans[at : at + _STRIDE, 2].sum()) for at in range(0, len(spans), _STRIDE)]
        self._starts = list(accumulate(sums, initial=0))
        self._number = next(_reader_numbers)
        _files.check_limit()

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out` (n,) with the ids from position `start`.

        Raises OSError, naming the file, if it cannot be read or was truncated.
        """
        span, skipped = self.span_at(start)
        spans = self.spans.data  # indexing a memoryview is faster, and returns Python integers
        done = 0
        while done < len(out):
            file, first, count = spans[span, 0], spans[span, 1], spans[span, 2]
            part = self._read(file, first + skipped, min(count - skipped, len(out) - done))
            out[done : done + len(part)] = part
            done += len(part)
            span, skipped = span + 1, 0

    def span_at(self, position: int) -> tuple[int, int]:
        """Return (index of the span, offset within it) of the id at `position`."""
        if len(self.spans) == 1:  # a corpus in one file
            return 0, position
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
            while data and len(data) < count * size:  # interrupted by a signal
                more = os.pread(descriptor, count * size - len(data), first * size + len(data))
                if not more:
                    break
                data += more
        except OSError as error:
            raise OSError(error.errno, f"cannot read the data ({error.strerror})", str(self._files[file])) from None
        if len(data) < count * size:
            raise OSError(
                f"{self._files[file]} was truncated while it was in use: it has {os.fstat(descriptor).st_size:,} "
                f"bytes, the data needs {(first + count) * size:,}"
            )
        return np.frombuffer(data, dtype=self._dtype)

    def __getstate__(self) -> dict[str, Any]:
        file = getattr(self.spans, "filename", None)  # of a memory-mapped table: its content is not sent
        return self.__dict__ | {"spans": self.spans if file is None else Path(file)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._number = next(_reader_numbers)  # the number from another process may be used here
        if isinstance(self.spans, Path):
            self.spans = map_array(self.spans)

    def __del__(self) -> None:
        if hasattr(self, "_number"):
            _files.close(self._number)
