"""Log lines on the console and in log.txt, and a progress bar on a terminal."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn

from components.metrics.writer import Row, RunInfo, Writer
from components.units import PositiveCount, format_count

log = logging.getLogger("powertrain")


def setup_logging(path: Path | None, *, to_console: bool) -> RichConsole:
    """Send the log to the terminal if `to_console`, and with times to the file `path`; return the terminal."""
    console = RichConsole(highlight=False, soft_wrap=True, quiet=not to_console)
    log.handlers.clear()
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(_ConsoleHandler(console))
    if path is not None:
        file = _FileHandler(path, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(file)
    return console


class _ConsoleHandler(logging.Handler):
    def __init__(self, console: RichConsole) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        style = {"WARNING": "yellow", "ERROR": "bold red"}.get(record.levelname)
        try:
            self.console.print(record.getMessage(), style=style, markup=False)
        except (OSError, SystemExit):  # SystemExit is how rich handles a broken pipe; training continues
            self.console.quiet = True


class _FileHandler(logging.FileHandler):
    """log.txt. Lines that did not fit on the disk still reach the terminal; a failure is reported once."""

    reported = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (the name is that of logging)
        if not self.reported:
            self.reported = True
            log.error(f"{self.baseFilename} cannot be written; training continues without it")


@dataclass(kw_only=True)
class Console(Writer):
    """Logs a line every few steps, on the console and in log.txt, and shows a progress bar on a terminal."""

    interval_steps: PositiveCount = 10
    """Steps between two log lines."""

    in_background = False

    def open(self, run: RunInfo) -> None:
        self._total_tokens = run.total_tokens
        self._bar = Progress(
            TextColumn("{task.percentage:3.0f}%"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[line]}"),
            console=run.console,
            disable=not run.console.is_terminal or run.console.quiet,
            transient=True,
        )
        self._task = self._bar.add_task("tokens", total=run.total_tokens, line="")
        self._bar.start()
        self._steps: list[Row] = []  # since the last line

    def write(self, row: Row) -> None:
        if "val_loss" in row:
            log.info(format_validation(row))
        if "loss" not in row:  # a row of a hook
            return
        self._steps.append(row)
        mean = mean_tokens_per_second(self._steps)
        mfu = None if row["mfu"] is None else row["mfu"] * mean / row["tokens_per_second"]
        row = {**row, "tokens_per_second": mean, "mfu": mfu}
        eta = seconds_left(row, self._total_tokens)
        with suppress(OSError, SystemExit):
            line = f"loss {row['loss']:.3f}  eta {format_duration(eta)}"
            self._bar.update(self._task, completed=row["tokens"], line=line)
        if row["step"] % self.interval_steps == 0 or row["step"] == 1:
            log.info(format_step(row, self._total_tokens))
            self._steps.clear()

    def close(self) -> None:
        with suppress(OSError, SystemExit):
            self._bar.stop()


def mean_tokens_per_second(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the mean tokens per second of `rows`: a single step may have been slowed by a disk or another program."""
    seconds = sum(row["step_seconds"] for row in rows)
    return sum(row["tokens_per_second"] * row["step_seconds"] for row in rows) / seconds if seconds else 0.0


def format_step(row: Mapping[str, Any], total_tokens: int) -> str:
    """Return the log line of a training step."""
    mfu = f"  mfu {row['mfu']:4.0%}" if row["mfu"] is not None else ""
    return (
        f"step {row['step']:>6}  "
        f"tokens {format_count(row['tokens']):>6}/{format_count(total_tokens)}  "
        f"loss {row['loss']:7.4f}  lr {row['lr']:.2e}  batch {row['global_batch_size']:>4}  "
        f"grad_norm {row['grad_norm']:6.3f}  {format_count(row['tokens_per_second']):>6} tok/s{mfu}  "
        f"eta {format_duration(seconds_left(row, total_tokens))}"
    )


def format_validation(row: Mapping[str, Any]) -> str:
    """Return the log line of a validation."""
    named = {key.removeprefix("val_loss_average_"): value for key, value in row.items() if "val_loss_average_" in key}
    averages = [f"  average {name} {loss:.4f}" for name, loss in named.items()]
    return (
        f"step {row['step']:>6}  validation  loss {row['val_loss']:.4f}  perplexity {row['val_perplexity']:.2f}  "
        f"bits per byte {row['val_bits_per_byte']:.4f}{''.join(averages)}"
    )


def seconds_left(row: Mapping[str, Any], total_tokens: int) -> float:
    """Return the estimated seconds to the end of the run."""
    speed = row["tokens_per_second"]
    return max(0, total_tokens - row["tokens"]) / speed if speed else math.inf


def format_duration(seconds: float) -> str:
    """Return `seconds` for display: 3725 -> "1h02m"."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    hours = whole // 3600
    return f"{hours // 24}d{hours % 24:02d}h" if hours >= 48 else f"{hours}h{whole % 3600 // 60:02d}m"
