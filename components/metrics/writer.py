"""What a writer of metrics is: a class with `write(row)` and `close()`, named by a table [metrics.writers.NAME]."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rich.console import Console as RichConsole

from components.errors import InputError

Row = Mapping[str, Any]
"""Values by name at one step. It has `step` and `tokens`; a step may have several rows, such as one of validation."""


@dataclass(frozen=True)
class RunInfo:
    """What writers may use of the run. Only the main process has writers."""

    name: str
    id: str
    """The identifier of the run; a resumed run keeps it."""
    directory: Path
    """The run directory."""
    metrics: Path
    """The file metrics.jsonl in it."""
    console: RichConsole
    after_step: int
    """The step that the run continues after; 0 for a new run."""
    total_tokens: int
    recipe: str
    """The complete recipe, in TOML."""
    hyperparameters: Mapping[str, Any]
    """The same as values by dotted key, without those that are unset."""
    environment: Mapping[str, Any]
    """Code version, package versions, host and devices; see environment.json."""

    @property
    def configuration(self) -> dict[str, Any]:
        """Hyperparameters and environment, for trackers that have one table for both."""
        return {**self.hyperparameters, "environment": dict(self.environment)}


@runtime_checkable
class AnyWriter(Protocol):
    """[metrics.writers.NAME]: one destination of the metrics. `use` names a class with `write(row)` and `close()`;
    `components.metrics.writer:Writer` lists the optional members."""

    def write(self, row: Row) -> None: ...
    def close(self) -> None: ...


def require_library(name: str) -> None:
    """Raise InputError if the library `name`, which is also the extra that installs it, is missing."""
    if importlib.util.find_spec(name) is None:
        raise InputError("use", f"needs the `{name}` library: pip install -e '.[{name}]'")


class Writer:
    """The members of a writer, with defaults for the optional ones. A custom class need not derive from it."""

    write: Callable[[Row], None]
    """Write a row.

    Raise OSError for a failure that may pass: a background writer gets the row again. After any other exception the row
    is dropped. Both are logged, and training continues.
    """
    close: Callable[[], None]
    """Called at the end of the run."""

    in_background = True
    """Whether the writer is called in a thread. It then reads the rows from metrics.jsonl, so that a slow or failing
    destination neither delays the run nor loses rows. Otherwise the training loop calls it."""

    def open(self, run: RunInfo) -> int | None:
        """Called once before the first row. An exception ends a new run; a resumed run tries again after an OSError.

        A destination that may lack rows that `write` has accepted returns the last step that it has, 0 for none: a
        background writer gets the rows after it. Otherwise the writer gets those that it did not get before.
        """
        return None

    def flush(self) -> None:
        """Make the rows so far durable. Called before a checkpoint, for writers that are not in the background."""
