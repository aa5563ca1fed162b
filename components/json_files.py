"""JSON files that may be damaged, or come from an untrusted source. This module imports nothing of the project.

Errors of the content are ValueErrors without the path: callers add it, and the remedy.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

LARGEST_BYTES = 2**26
"""Default limit. The index of a model with a hundred thousand tensors takes a tenth of it."""

Size = Annotated[int, Field(ge=0, lt=2**62)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""A SHA-256 in hex."""


class StrictModel(BaseModel):
    """JSON that must match the model exactly: unknown fields and other types are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def read_limited(path: Path, largest: float = LARGEST_BYTES) -> str:
    """Return the text of a file. Raises OSError, or ValueError for one of more than `largest` bytes or not in UTF-8."""
    if (size := path.stat().st_size) > largest:
        raise ValueError(f"{size:,} bytes; at most {largest:,} are accepted")
    return path.read_text(encoding="utf-8")


def read_object(path: Path, largest: float = LARGEST_BYTES) -> dict[str, Any]:
    """Return the JSON object in a file. Raises OSError, or ValueError for any other content."""
    text = read_limited(path, largest)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"holds a {type(content).__name__}, expected an object")
    return content


def first_problem(error: ValidationError) -> str:
    """Return the first field that does not match its model, and why."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or "the file"
    return f"{where}: {first['msg']}"
