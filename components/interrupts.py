"""Requests from outside, read by the loop between steps: signals, a stop file, a time limit."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAVING = signal.SIGUSR1
ONE_REQUEST_SECONDS = 1.0
"""Signals this close together are one request: a scheduler signals a whole job, and a launcher passes its own on."""

NONE, SAVE, TIME_LIMIT, STOP_FILE = 0, 1, 2, 3
_SIGNALS = 100
"""Requests are numbers, of which the largest of all ranks is what all do; above this, the number of a signal more."""
REQUESTS = (NONE, SAVE, TIME_LIMIT, STOP_FILE, *sorted(_SIGNALS + number for number in STOPPING))
"""All that there are, the smallest first."""
_FILE_INTERVAL_SECONDS = 0.5


class SignalCatcher:
    """Catches SIGINT, SIGTERM and SIGHUP once, and SIGUSR1; a second SIGINT or SIGTERM acts at once, as if not caught.

    A signal that the process was started to ignore stays ignored: SIGHUP under nohup, SIGINT in the background of a
    script. SIGUSR1 is always caught, because the launcher itself ignores it until a run is ready to save.

    `received` is the number of the signal to stop, 0 while there was none; `save` whether to save and go on. Use as a
    context manager: leaving it restores the handlers that were there before.
    """

    def __init__(self) -> None:
        self.received = 0
        self.save = False
        self._at = 0.0
        self._save_at = -ONE_REQUEST_SECONDS
        self._before: dict[int, Any] = {}

    def __enter__(self) -> SignalCatcher:
        for number in not_ignored(STOPPING):
            self._before[number] = signal.signal(number, self._catch)
        self._before[SAVING] = signal.signal(SAVING, self._catch_save)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._at = number, time.monotonic()
        elif is_repeated(number, time.monotonic() - self._at):
            self._restore()
            signal.raise_signal(number)

    def _catch_save(self, number: int, frame: FrameType | None) -> None:
        if time.monotonic() - self._save_at > ONE_REQUEST_SECONDS:
            self.save, self._save_at = True, time.monotonic()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()


def not_ignored(numbers: Iterable[signal.Signals]) -> list[signal.Signals]:
    """Those of `numbers` that this process does not ignore."""
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]


def is_repeated(number: int, seconds: float) -> bool:
    """Whether `number`, received `seconds` after a first request to stop, asks to stop at once.

    SIGHUP never does. Nobody repeats it out of impatience, but when a terminal closes the shell and the kernel both
    send it, and some service managers send it after SIGTERM.
    """
    return number != signal.SIGHUP and seconds > ONE_REQUEST_SECONDS


class StopRequests:
    """What this process was asked to do. All take the largest number that one of them found."""

    def __init__(self, signals: SignalCatcher, *, file: Path | None, ends_at: float | None) -> None:
        """`file` stops the run once it exists, a time of `time.time()` does when it has come."""
        self.signals = signals
        self.file = file
        self.ends_at = ends_at
        self.agreed = NONE
        """The largest request that all processes agreed on and that was not met yet."""
        self._looked_at = 0.0

    def poll(self) -> int:
        """NONE, SAVE, or a number that `stops`."""
        if self.signals.received:
            return _SIGNALS + self.signals.received
        if self._file_exists():
            return STOP_FILE
        if self.ends_at is not None and time.time() >= self.ends_at:
            return TIME_LIMIT
        return SAVE if self.signals.save else NONE

    def mark_saved(self) -> None:
        """The request to save was met. Call on all ranks: a signal may have reached one of them, or each."""
        self.signals.save = False
        if self.agreed == SAVE:
            self.agreed = NONE

    def remove_stop_file(self) -> None:
        """Remove the stop file: it has been obeyed, or was meant for a run before."""
        if self.file is not None:
            with suppress(OSError):
                self.file.unlink()

    def _file_exists(self) -> bool:
        now = time.monotonic()
        if self.file is None or now - self._looked_at < _FILE_INTERVAL_SECONDS:
            return False
        self._looked_at = now
        return self.file.exists()


def is_stop(request: int) -> bool:
    return request > SAVE


def exit_status(request: int) -> int:
    """Of a run that was stopped by `request` after it has saved.

    Somebody's stop file is as good as a Ctrl-C. The time limit is as a scheduler's SIGTERM, after which it goes on.
    """
    if request > _SIGNALS:
        return 128 + request - _SIGNALS
    return 128 + (signal.SIGINT if request == STOP_FILE else signal.SIGTERM)


def reason(request: int) -> str:
    if request > _SIGNALS:
        return f"signal {request - _SIGNALS}"
    return "the stop file" if request == STOP_FILE else "run.max_minutes"
