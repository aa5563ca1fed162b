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
        """One row; numbers that are not finite become null, as JSON has none."""
        self._file.write(json.dumps({key: _finite(value) for key, value in row.items()}) + "\n")

    def close(self) -> None:
        self._file.close()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
