"""metrics.jsonl: one JSON object a line, one line a step or a validation."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.metrics.append import Appended

_LONGEST_ROW_BYTES = 2**20


class JsonLines:
    """Appends rows to a file, each at once."""

    def __init__(self, path: Path, *, after_step: int = 0) -> None:
        """Continue `path` after `after_step`: what an interrupted run wrote beyond it is cut off."""
        _truncate(path, after_step)
        self._file = Appended(path)

    def write(self, row: Mapping[str, Any]) -> None:
        """One row. Raises OSError if it has to wait."""
        self._file.append(f"{json_object(row)}\n".encode())

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __str__(self) -> str:
        return str(self._file.path)


def json_object(row: Mapping[str, Any], *, indent: int | None = None) -> str:
    """As JSON. Numbers that are not finite become null: JSON has none, and readers refuse Python's `Infinity`."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite, indent=indent)


def last_row(path: Path) -> dict[str, Any] | None:
    """The last whole row of a file that `JsonLines` has opened; None where it has none."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _LONGEST_ROW_BYTES))
        lines = file.read().splitlines()
    row: dict[str, Any] | None = json.loads(lines[-1]) if lines else None
    return row


def _truncate(path: Path, after_step: int) -> None:
    """Keep the leading whole rows whose step is at most `after_step`."""
    if not path.exists():
        return
    kept = 0
    with path.open("rb") as file:
        for line in file:
            try:
                step = json.loads(line)["step"]
                whole = line.endswith(b"\n") and step <= after_step
            except (ValueError, KeyError, TypeError):
                break
            if not whole:
                break
            kept += len(line)
    os.truncate(path, kept)
