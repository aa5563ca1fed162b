"""A writer in a thread, which reads the rows from metrics.jsonl: a slow or failing writer does not delay training.

The file is the queue. It holds every row, so that nothing is lost or kept in memory however long a writer fails, and a
resumed run continues with the row after the last one that was written, whichever step its checkpoint is of.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from components.metrics.jsonl import parse_row
from components.metrics.writer import Row, RunInfo, Writer
from components.retry import Retries

log = logging.getLogger("powertrain")
CLOSE_SECONDS = 30.0
"""How long the end of a run waits for a writer."""
_RECORD_BYTES = 64


class Position(NamedTuple):
    """The rows that were written: all of the steps before `step`, and the first `rows` of it."""

    step: int = 0
    rows: int = 0

    def next(self, step: int) -> Position:
        """Return the position after one more row, of `step`."""
        return Position(step, self.rows + 1 if step == self.step else 1)


class PositionFile:
    """A file with the position of a writer, updated after every row by one write in place."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    def read(self) -> Position:
        """Return the position; that of the start if nothing was written yet or the file is damaged."""
        try:
            step, rows = json.loads(os.pread(self._handle, _RECORD_BYTES, 0))
            return Position(int(step), int(rows))
        except (ValueError, TypeError, OverflowError, OSError):
            return Position()

    def save(self, position: Position) -> None:
        with suppress(OSError):  # the first write fails on a full disk
            os.pwrite(self._handle, json.dumps(position).ljust(_RECORD_BYTES - 1).encode() + b"\n", 0)

    def close(self) -> None:
        os.close(self._handle)


class BackgroundWriter:
    """Runs a writer in a daemon thread. All calls of the writer come from this thread."""

    def __init__(self, writer: Writer, name: str, run: RunInfo, position: Path) -> None:
        """`name` is for messages; the file `position` holds what was written.

        Raises what `writer.open` raises, for a new run. A resumed run does not wait for it.
        """
        self._writer, self._name, self._run = writer, name, run
        self._position = PositionFile(position)
        self._row_added, self._opened, self._retries = threading.Event(), threading.Event(), Retries()
        self._open_error: Exception | None = None
        self._written = self._position.read()
        self._dropped = 0
        self._thread = threading.Thread(target=self._work, name=f"metrics {name}", daemon=True)
        self._thread.start()
        if not run.after_step:
            self._opened.wait()
            if self._open_error is not None:
                raise self._open_error

    def wake(self) -> None:
        """Call after a row was added to metrics.jsonl."""
        self._row_added.set()

    def close(self) -> None:
        """Write the remaining rows and close the writer. Returns after `CLOSE_SECONDS` at the latest."""
        self._retries.close(CLOSE_SECONDS)
        self._row_added.set()
        self._thread.join(CLOSE_SECONDS)

    def failures(self) -> list[str]:
        """Return descriptions of the rows that this writer does not have."""
        found = []
        if self._dropped:
            found.append(f"{self._name} did not accept {self._dropped} rows; its first error is in log.txt")
        if self._retries.is_failing or self._thread.is_alive():
            found.append(f"{self._name} lacks the last rows; {self._run.metrics} has them, and --resume writes them")
        elif self._retries.failures:
            found.append(
                f"{self._name} could not be written {self._retries.failures} times; the rows were written later"
            )
        return found

    def _work(self) -> None:
        try:
            if self._open() and self._write_rows():
                self._writer.close()
        except Exception as error:  # in `close`, or metrics.jsonl cannot be read
            self._retries.is_failing = True
            log.error(f"{self._name} has ended: {_describe(error)}; training continues without it")
        self._position.close()

    def _open(self) -> bool:
        """Open the writer; return whether it is open."""
        try:
            if not self._run.after_step:
                self._call_open()
                return True
            return self._repeat(self._call_open, "opened")
        except Exception as error:
            self._open_error, self._retries.is_failing = error, True
            if self._run.after_step:
                log.error(f"{self._name} cannot be opened: {_describe(error)}; training continues without it")
            return False
        finally:
            self._opened.set()

    def _call_open(self) -> None:
        last_step = self._writer.open(self._run)
        if last_step is not None:
            self._written = Position(last_step + 1)

    def _write_rows(self) -> bool:
        """Write all rows until the run is closed; return whether that succeeded."""
        for row, position in self._rows():
            try:
                if not self._repeat(lambda row=row: self._writer.write(row), "written"):  # type: ignore[misc]
                    return False
            except Exception as error:  # the same row would fail again
                if not self._dropped:
                    log.error(f"{self._name} does not accept a row: {_describe(error)}; training continues")
                self._dropped += 1
            self._position.save(position)
        return True

    def _repeat(self, do: Callable[[], None], what: str) -> bool:
        """Call `do` until it raises no OSError, at the end for `CLOSE_SECONDS`; return whether it succeeded."""

        def failure(error: Exception) -> str:
            return (
                f"{self._name} cannot be {what}: {error}; training continues; its rows stay in metrics.jsonl and are "
                "written later"
            )

        return self._retries.call(do, OSError, failure, f"{self._name} can be {what} again")

    def _rows(self) -> Iterator[tuple[Row, Position]]:
        """Yield the rows that are not written yet and the position after each; ends when the run is closed."""
        position = Position()
        with self._run.metrics.open("rb") as file:
            while True:
                self._row_added.clear()
                is_complete = self._retries.closing.is_set()
                line = file.readline()
                if not line.endswith(b"\n"):
                    if is_complete:
                        return
                    file.seek(-len(line), os.SEEK_CUR)
                    self._row_added.wait()
                elif (row := parse_row(line)) is not None:
                    position = position.next(row["step"])
                    if position > self._written:
                        yield row, position


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
