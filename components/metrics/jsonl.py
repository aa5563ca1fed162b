"""metrics.jsonl: one JSON object a line, one line a step or a validation."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class JsonLines:
    """Appends rows to a file, each written at once, so that a reader and a crash both see whole lines."""

    def __init__(self, path: Path, *, after_step: int = 0) -> None:
        """Continue `path` after `after_step`: what an interrupted run wrote beyond it is cut off."""
        self.path = path
        _truncate(path, after_step)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, row: Mapping[str, Any]) -> None:
        """One row."""
        self._file.write(json_object(row) + "\n")

    def close(self) -> None:
        self._file.close()


def json_object(row: Mapping[str, Any], *, indent: int | None = None) -> str:
    """As JSON. Numbers that are not finite become null: JSON has none, and readers refuse Python's `Infinity`."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite, indent=indent)


def _truncate(path: Path, after_step: int) -> None:
    """Keep the leading whole rows whose step is at most `after_step`."""
    if not path.exists():
        return
    kept = 0
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or row.get("step", 0) > after_step:
                break
            kept += len(line)
    os.truncate(path, kept)
