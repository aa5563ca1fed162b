"""[metrics]: the writers of metrics, and a logger that passes every row to all of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console as RichConsole

from components.metrics.console import ConsoleLogger
from components.metrics.jsonl import JsonLinesWriter
from components.units import PositiveCount

log = logging.getLogger("powertrain")


class MetricWriter(Protocol):
    def write(self, row: Mapping[str, Any]) -> None: ...
    def flush(self) -> None:
        """Make the rows so far durable."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """[metrics]: where the metrics of a run are written. metrics.jsonl always has every step."""

    tensorboard: bool = True
    """Write TensorBoard event files."""
    console_interval_steps: PositiveCount = 10
    """Steps between two log lines, on the console and in log.txt."""

    def build(
        self,
        *,
        jsonl: Path,
        tensorboard: Path,
        console: RichConsole,
        after_step: int,
        total_tokens: int,
        run: str = "",
    ) -> MetricLogger:
        """Return the logger of the run with the identifier `run`, which continues after `after_step`."""
        writers: list[MetricWriter] = [
            JsonLinesWriter(jsonl, after_step=after_step),
            ConsoleLogger(console, interval_steps=self.console_interval_steps, total_tokens=total_tokens),
        ]
        if self.tensorboard:
            # importing it takes half a second
            from components.metrics.tensorboard import TensorBoardWriter

            writers.append(TensorBoardWriter(tensorboard, after_step=after_step, run=run))
        return MetricLogger(writers)


class MetricLogger:
    """Passes every row to every writer. On ranks other than 0 it has no writers and does nothing.

    A writer that fails, because the disk is full or missing, does not end the run. The first failure and the recovery
    are logged, and `failures` returns what was lost.
    """

    def __init__(self, writers: list[MetricWriter]) -> None:
        self.writers = writers
        self._failed: dict[str, int] = {}
        self._failing: set[str] = set()

    def write(self, row: Mapping[str, Any]) -> None:
        for writer in self.writers:
            self._attempt(writer, partial(writer.write, row))

    def flush(self) -> None:
        """Make the rows so far durable. Called before a checkpoint, which must not be ahead of the metrics."""
        for writer in self.writers:
            self._attempt(writer, writer.flush)

    def failures(self) -> list[str]:
        """Return a description of each writer that failed."""
        return [
            f"{name} could not be written {count} times; "
            + ("rows are missing at its end" if name in self._failing else "the rows were added later")
            for name, count in self._failed.items()
        ]

    def close(self) -> None:
        for writer in self.writers:
            self._attempt(writer, writer.close)

    def _attempt(self, writer: MetricWriter, do: Callable[[], None]) -> None:
        name = str(writer)
        try:
            do()
        except OSError as error:
            self._failed[name] = self._failed.get(name, 0) + 1
            if name not in self._failing:
                self._failing.add(name)
                log.error(f"{name} cannot be written: {error}; training continues")
            return
        if name in self._failing:
            self._failing.discard(name)
            log.warning(f"{name} can be written again")
