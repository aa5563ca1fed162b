"""The monitor: turns what happened in a step into one row and gives it to every writer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console as RichConsole

from components.metrics.console import ConsoleProgress
from components.metrics.jsonl import JsonLines
from components.metrics.tensorboard import TensorBoard
from components.quantities import PositiveCount


class Writer(Protocol):
    def write(self, row: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """[metrics]: where the numbers of a run go. metrics.jsonl has every step."""

    tensorboard: bool = True
    """Write TensorBoard event files."""
    console_interval_steps: PositiveCount = 10
    """Steps between two lines on the console and in log.txt."""

    def build(
        self, *, jsonl: Path, tensorboard: Path, console: RichConsole, after_step: int, total_tokens: int
    ) -> Monitor:
        """A monitor that continues after `after_step`."""
        writers: list[Writer] = [
            JsonLines(jsonl, after_step=after_step),
            ConsoleProgress(console, interval_steps=self.console_interval_steps, total_tokens=total_tokens),
        ]
        if self.tensorboard:
            writers.append(TensorBoard(tensorboard, after_step=after_step))
        return Monitor(writers)


class Monitor:
    """Gives every row to every writer. One without writers, as on all ranks but the first, swallows them."""

    def __init__(self, writers: list[Writer]) -> None:
        self.writers = writers

    def write(self, row: Mapping[str, Any]) -> None:
        for writer in self.writers:
            writer.write(row)

    def close(self) -> None:
        for writer in self.writers:
            writer.close()
