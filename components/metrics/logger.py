"""[metrics]: the writers of metrics, and a logger that passes every row to all of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from components.errors import InputError, invalid_names
from components.metrics.background import BackgroundWriter
from components.metrics.console import Console
from components.metrics.jsonl import JsonLines
from components.metrics.tensorboard import TensorBoard
from components.metrics.writer import AnyWriter, Row, RunInfo, Writer
from components.protocol_defaults import with_defaults

log = logging.getLogger("powertrain")


def _default_writers() -> dict[str, AnyWriter | None]:
    return {"jsonl": JsonLines(), "console": Console(), "tensorboard": TensorBoard()}


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """[metrics]: where the metrics of a run are written."""

    writers: dict[str, AnyWriter | None] = field(default_factory=_default_writers)
    """The writers by name; see docs/metrics.md. Tables are added to the default ones `jsonl`, `console` and
    `tensorboard`; "none" removes one."""

    def __post_init__(self) -> None:
        for problem in invalid_names(self.writers):
            raise InputError("writers", problem)
        if not isinstance(self.writers.get("jsonl"), JsonLines):
            raise InputError("writers.jsonl", "metrics.jsonl cannot be turned off or replaced; the run reads it")

    def build(self, run: RunInfo, positions: Path) -> MetricLogger:
        """Open the writers of a run. `positions` is the directory for the progress of the background writers.

        Raises what a writer raises if it cannot be opened.
        """
        logger = MetricLogger()
        writers = {name: with_defaults(each, Writer) for name, each in self.writers.items() if each is not None}
        for name in sorted(writers, key="jsonl".__ne__):  # the first one, since background writers read its file
            logger.add(name, writers[name], run, positions)
        return logger


class MetricLogger:
    """Passes every row to every writer. On ranks other than 0 it has no writers and does nothing.

    A writer that fails does not end the run. Its first failure and recovery are logged; `close` logs what was lost.
    """

    def __init__(self) -> None:
        self._writers: dict[str, Writer] = {}
        self._background: list[BackgroundWriter] = []
        self._failed: dict[str, int] = {}
        self._failing: set[str] = set()
        self._is_closed = False

    def add(self, name: str, writer: Writer, run: RunInfo, positions: Path) -> None:
        """Open a writer and pass later rows to it. Raises what `open` raises."""
        if writer.in_background:
            position = positions / f"{name}.json"
            self._background.append(BackgroundWriter(writer, f"[metrics.writers.{name}]", run, position))
        else:
            writer.open(run)
            self._writers[name] = writer

    def log(self, row: Row) -> None:
        """Pass a row to every writer."""
        for name, writer in self._writers.items():
            self._attempt(name, partial(writer.write, row))
        for each in self._background:
            each.wake()

    def flush(self) -> None:
        """Make the rows so far durable. Called before a checkpoint, which must not be ahead of the metrics."""
        for name, writer in self._writers.items():
            self._attempt(name, writer.flush)

    def close(self) -> None:
        """Write what is still missing, close all writers, and log what was lost. Later calls have no effect."""
        if self._is_closed:
            return
        self._is_closed = True
        for name, writer in self._writers.items():
            self._attempt(name, writer.close)
        for each in self._background:
            each.close()
        for failure in self.failures():
            log.error(failure)

    def failures(self) -> list[str]:
        """Return a description of each writer that failed."""
        direct = [
            f"[metrics.writers.{name}] could not be written {count} times; "
            + ("rows are missing at its end" if name in self._failing else "the rows were written later")
            for name, count in self._failed.items()
        ]
        return direct + [failure for each in self._background for failure in each.failures()]

    def _attempt(self, name: str, do: Callable[[], None]) -> None:
        try:
            do()
        except Exception as error:
            self._failed[name] = self._failed.get(name, 0) + 1
            if name not in self._failing:
                self._failing.add(name)
                log.error(f"[metrics.writers.{name}] cannot be written: {error}; training continues")
            return
        if name in self._failing:
            self._failing.discard(name)
            log.warning(f"[metrics.writers.{name}] can be written again")
