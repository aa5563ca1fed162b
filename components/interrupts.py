"""Requests to stop or save, which the training loop polls between steps: signals, a stop file, a time limit."""

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
RESTARTING = signal.SIGUSR2
"""Sent by the launcher: save and exit, to be started again on other nodes."""
ONE_REQUEST_SECONDS = 1.0
"""Signals within this time are one request: a scheduler signals a whole job, and the launcher forwards its signal
too."""

NONE, SAVE, RESTART, TIME_LIMIT, STOP_FILE = 0, 1, 2, 3, 4
RESTART_STATUS = 75
"""Exit status of a process that has saved and is to be started again (EX_TEMPFAIL of sysexits.h)."""
_SIGNALS = 100
"""Requests are integers, and all ranks act on the largest one. _SIGNALS + n is a stop by signal n."""
REQUESTS = (NONE, SAVE, RESTART, TIME_LIMIT, STOP_FILE, *sorted(_SIGNALS + number for number in STOPPING))
"""All requests, in increasing order."""
_FILE_INTERVAL_SECONDS = 0.5


class SignalCatcher:
    """Catches SIGUSR1, and the first SIGINT, SIGTERM or SIGHUP; a second SIGINT or SIGTERM has its default effect.

    A signal that was ignored when the process started stays ignored: SIGHUP under nohup, SIGINT for background jobs of
    a script. SIGUSR1 and SIGUSR2 are always caught, because they are ignored until a run is ready to save.

    `received` is the number of the signal to stop, or 0; `save` is whether to save and continue, `restart` whether to
    save and exit. Use as a context manager, which restores the previous handlers on exit.
    """

    def __init__(self) -> None:
        self.received = 0
        self.save, self.restart = False, False
        self._at = 0.0
        self._save_at = -ONE_REQUEST_SECONDS
        self._before: dict[int, Any] = {}

    def __enter__(self) -> SignalCatcher:
        for number in not_ignored(STOPPING):
            self._before[number] = signal.signal(number, self._catch)
        self._before[SAVING] = signal.signal(SAVING, self._catch_save)
        self._before[RESTARTING] = signal.signal(RESTARTING, self._catch_restart)
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

    def _catch_restart(self, number: int, frame: FrameType | None) -> None:
        self.restart = True

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()


def not_ignored(numbers: Iterable[signal.Signals]) -> list[signal.Signals]:
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]


def is_repeated(number: int, seconds: float) -> bool:
    """Return whether signal `number`, received `seconds` after the first one, is a request to stop at once.

    SIGHUP never is: when a terminal closes, both the shell and the kernel send it, and some service managers send it
    after SIGTERM.
    """
    return number != signal.SIGHUP and seconds > ONE_REQUEST_SECONDS


class StopRequests:
    """The requests to this process: signals, a stop file and a time limit."""

    def __init__(self, signals: SignalCatcher, *, file: Path | None, ends_at: float | None) -> None:
        """The run stops when `file` exists, or when `time.time()` reaches `ends_at`."""
        self.signals = signals
        self.file = file
        self.ends_at = ends_at
        self.agreed = NONE
        """The largest request of all processes that was not fulfilled yet."""
        self._looked_at, self._file_found = 0.0, False

    def poll(self) -> int:
        """Return the current request of this process: NONE, SAVE, or one for which `is_stop` is true."""
        if self.signals.received:
            return _SIGNALS + self.signals.received
        if self._file_exists():
            return STOP_FILE
        if self.ends_at is not None and time.time() >= self.ends_at:
            return TIME_LIMIT
        if self.signals.restart:
            return RESTART
        return SAVE if self.signals.save else NONE

    def mark_saved(self) -> None:
        """Clear the request to save, after saving. Call on all ranks: a signal may have reached one or all of them."""
        self.signals.save = False
        if self.agreed == SAVE:
            self.agreed = NONE

    def remove_stop_file(self) -> None:
        """Remove the stop file after the run obeyed it, or one that was left for an earlier run."""
        self._file_found = False
        if self.file is not None:
            with suppress(OSError):
                self.file.unlink()

    def _file_exists(self) -> bool:
        """Return whether the stop file has been seen; looks for it at most every `_FILE_INTERVAL_SECONDS`."""
        now = time.monotonic()
        if self.file is not None and not self._file_found and now - self._looked_at >= _FILE_INTERVAL_SECONDS:
            self._looked_at, self._file_found = now, self.file.exists()
        return self._file_found


def is_stop(request: int) -> bool:
    return request > SAVE


def exit_status(request: int) -> int:
    """Return the exit status of a run that was stopped by `request`: 128 + signal.

    A stop file counts as SIGINT (stopped by a user), the time limit as SIGTERM (stopped by a scheduler). A process that
    is to be started again has RESTART_STATUS.
    """
    if request == RESTART:
        return RESTART_STATUS
    if request > _SIGNALS:
        return 128 + request - _SIGNALS
    return 128 + (signal.SIGINT if request == STOP_FILE else signal.SIGTERM)


def reason(request: int) -> str:
    """Return the cause of a stop, for the log."""
    if request > _SIGNALS:
        return f"signal {request - _SIGNALS}"
    return "the stop file" if request == STOP_FILE else "run.max_minutes"
