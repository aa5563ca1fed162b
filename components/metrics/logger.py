"""The monitor: turns what happened in a step into one row and gives it to every writer."""

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
        """Make durable what was written."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """[metrics]: where the numbers of a run go. metrics.jsonl has every step."""

    tensorboard: bool = True
    """Write TensorBoard event files."""
    console_interval_steps: PositiveCount = 10
    """Steps between two lines on the console and in log.txt."""

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
        """A monitor of the run with the identifier `run` that continues after `after_step`."""
        writers: list[MetricWriter] = [
            JsonLinesWriter(jsonl, after_step=after_step),
            ConsoleLogger(console, interval_steps=self.console_interval_steps, total_tokens=total_tokens),
        ]
        if self.tensorboard:
            from components.metrics.tensorboard import (
                TensorBoardWriter,  # half a second that a run without it need not pay
            )

            writers.append(TensorBoardWriter(tensorboard, after_step=after_step, run=run))
        return MetricLogger(writers)


class MetricLogger:
    """Gives every row to every writer. One without writers, as on all ranks but the first, swallows them.

    A writer that fails, because the disk is full or gone, does not end the run. It is told when it begins to fail and
    when it no longer does, and `failures` tells at the end what was lost.
    """

    def __init__(self, writers: list[MetricWriter]) -> None:
        self.writers = writers
        self._failed: dict[str, int] = {}
        self._failing: set[str] = set()

    def write(self, row: Mapping[str, Any]) -> None:
        for writer in self.writers:
            self._attempt(writer, partial(writer.write, row))

    def flush(self) -> None:
        """Bring the rows so far to the disk, as before a checkpoint that must not be ahead of them."""
        for writer in self.writers:
            self._attempt(writer, writer.flush)

    def failures(self) -> list[str]:
        """What went wrong, in words."""
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
                log.error(f"{name} cannot be written: {error}. Training goes on")
            return
        if name in self._failing:
            self._failing.discard(name)
            log.warning(f"{name} can be written again")
