"""What a person sees: a line every few steps, on a terminal also a bar that shows how far the run is."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn

from components.units import format_count

log = logging.getLogger("powertrain")


def setup_logging(path: Path | None, *, console: bool) -> RichConsole:
    """Send the log to the terminal (if `console`) and, with times, to the file `path`."""
    console = RichConsole(highlight=False, soft_wrap=True, quiet=not console)
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
        except (OSError, SystemExit):  # rich's answer to a broken pipe; whoever listened has left, and training goes on
            self.console.quiet = True


class _FileHandler(logging.FileHandler):
    """log.txt. What a full disk does not take is on the terminal, where it is told once that it is not here."""

    told = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (the name is that of logging)
        if not self.told:
            self.told = True
            log.error(f"{self.baseFilename} cannot be written. Training goes on")


class ConsoleLogger:
    """Logs one line every `interval_steps` and keeps a bar of tokens below it, if the console is a terminal."""

    def __init__(self, console: RichConsole, *, interval_steps: int, total_tokens: int) -> None:
        self.interval_steps = interval_steps
        self.total_tokens = total_tokens
        self._bar = Progress(
            TextColumn("{task.percentage:3.0f}%"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[line]}"),
            console=console,
            disable=not console.is_terminal or console.quiet,
            transient=True,
        )
        self._task = self._bar.add_task("tokens", total=total_tokens, line="")
        self._bar.start()
        self._steps: list[Mapping[str, Any]] = []  # since the last line

    def write(self, row: Mapping[str, Any]) -> None:
        if "val_loss" in row:
            log.info(format_validation(row))
        if "loss" not in row:  # of a hook
            return
        self._steps.append(row)
        mean = format_tokens_per_second(self._steps)
        mfu = None if row["mfu"] is None else row["mfu"] * mean / row["tokens_per_second"]
        row = {**row, "tokens_per_second": mean, "mfu": mfu}
        left = seconds_left(row, self.total_tokens)
        with suppress(OSError, SystemExit):
            line = f"loss {row['loss']:.3f}  {format_duration(left)} left"
            self._bar.update(self._task, completed=row["tokens"], line=line)
        if row["step"] % self.interval_steps == 0 or row["step"] == 1:
            log.info(format_step(row, self.total_tokens))
            self._steps.clear()

    def flush(self) -> None:
        pass

    def close(self) -> None:
        with suppress(OSError, SystemExit):
            self._bar.stop()


def format_tokens_per_second(rows: Sequence[Mapping[str, Any]]) -> float:
    """Tokens per second over several steps: one alone may have waited for a disk or another program."""
    seconds = sum(row["step_seconds"] for row in rows)
    return sum(row["tokens_per_second"] * row["step_seconds"] for row in rows) / seconds if seconds else 0.0


def format_step(row: Mapping[str, Any], total_tokens: int) -> str:
    mfu = f"  mfu {row['mfu']:4.0%}" if row["mfu"] is not None else ""
    return (
        f"step {row['step']:>6}  "
        f"tokens {format_count(row['tokens']):>6}/{format_count(total_tokens)}  "
        f"loss {row['loss']:7.4f}  lr {row['lr']:.2e}  batch {row['global_batch_size']:>4}  "
        f"grad {row['grad_norm']:6.3f}  {format_count(row['tokens_per_second']):>6} tok/s{mfu}  "
        f"left {format_duration(seconds_left(row, total_tokens))}"
    )


def format_validation(row: Mapping[str, Any]) -> str:
    return (
        f"step {row['step']:>6}  validation  loss {row['val_loss']:.4f}  perplexity {row['val_perplexity']:.2f}  "
        f"bits per byte {row['val_bits_per_byte']:.4f}"
    )


def seconds_left(row: Mapping[str, Any], total_tokens: int) -> float:
    speed = row["tokens_per_second"]
    return max(0, total_tokens - row["tokens"]) / speed if speed else math.inf


def format_duration(seconds: float) -> str:
    """3725 -> "1h02m"."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    hours = whole // 3600
    return f"{hours // 24}d{hours % 24:02d}h" if hours >= 48 else f"{hours}h{whole % 3600 // 60:02d}m"
