"""metrics.jsonl: one JSON object per line, one line per step or validation."""

from __future__ import annotations

import io
import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.metrics.append_only_file import AppendOnlyFile
from components.metrics.writer import Row, RunInfo, Writer
from components.paths import is_file

log = logging.getLogger("powertrain")
_LONGEST_ROW_BYTES = 2**20


class JsonLines(Writer):
    """Appends every row to metrics.jsonl, immediately. Always on: other writers and the tools read this file."""

    in_background = False

    def open(self, run: RunInfo) -> None:
        """Continue the file after `run.after_step`; later rows of an interrupted run are removed."""
        _truncate(run.metrics, run.after_step)
        self._file = AppendOnlyFile(run.metrics)

    def write(self, row: Row) -> None:
        """Append a row. Raises OSError if it could not be written yet."""
        self._file.append(f"{json_object(row)}\n".encode())

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def json_object(row: Mapping[str, Any], *, indent: int | None = None) -> str:
    """Return `row` as JSON. Numbers that are not finite become null, because readers reject Python's `Infinity`."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite, indent=indent)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of the file, or none if it does not exist. A last line without line end is ignored.

    Raises ValueError with the line number for a line that is not a row.
    """
    rows = []
    with path.open("rb") if is_file(path) else io.BytesIO() as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            if (row := parse_row(line)) is None:
                raise ValueError(f"{path}:{number} is not a row of metrics: {line[:60]!r}; remove this line")
            rows.append(row)
    return rows


def last_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of the last step in a file that `JsonLines` has opened."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _LONGEST_ROW_BYTES))
        rows = [row for line in file.read().splitlines() if (row := parse_row(line)) is not None]
    return [row for row in rows if row["step"] == rows[-1]["step"]]


def parse_row(line: bytes) -> dict[str, Any] | None:
    """Return the row of a line, or None if it is not a row."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def _truncate(path: Path, after_step: int) -> None:
    """Truncate the file before the first row with a step above `after_step`, or before a last line without line end.

    Other damaged lines are kept, so that the rows after them are not lost.
    """
    if not is_file(path):
        return
    kept = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            row = parse_row(line)
            if not line.endswith(b"\n") or (row is not None and row["step"] > after_step):
                break
            if row is None:
                log.warning(
                    f"{path}:{number} is not a row of metrics; it is kept, and tools reject the file until it is gone"
                )
            kept += len(line)
    os.truncate(path, kept)
