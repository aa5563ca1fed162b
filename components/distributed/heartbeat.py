"""Detect processes that make no progress: each touches a file in every step, and its launcher watches the files.

A process hangs in a collective, in a read from a disk that does not answer, or because it was stopped. The launcher
then lets all processes of its node write their Python stacks to standard error, and ends them.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

_DIRECTORY = "POWERTRAIN_HEARTBEATS"
"""Environment variable of the workers: the directory of the files; empty if heartbeats are off."""
DUMPING = signal.SIGQUIT
"""Signal on which a worker writes the stacks of its threads."""
_STOPPED_SECONDS = 5
"""If the launcher has not checked for this time, it was stopped, as by Ctrl-Z, and probably the workers too."""


class Heartbeats:
    """The heartbeats of the workers of one node, as the launcher sees them."""

    def __init__(self, directory: Path, timeout_seconds: float | None) -> None:
        """Without `timeout_seconds`, heartbeats are off."""
        self._directory, self._timeout = directory, timeout_seconds
        self._seen: dict[str, tuple[int, float]] = {}
        self._looked_at = time.monotonic()
        directory.mkdir()
        os.environ[_DIRECTORY] = str(directory) if timeout_seconds is not None else ""

    def clear(self) -> None:
        """Call before the workers start."""
        self._seen.clear()
        for file in self._directory.iterdir():
            file.unlink()

    def hung_ranks(self) -> list[int]:
        """Return the ranks that have made no progress for the timeout. Call often."""
        now = time.monotonic()
        if self._timeout is None:
            return []
        if now - self._looked_at > _STOPPED_SECONDS:
            self._seen.clear()
        self._looked_at = now
        before, self._seen = self._seen, {}
        for file in self._directory.iterdir():
            with suppress(FileNotFoundError):  # its process has called `end`
                touched, seen = file.stat().st_mtime_ns, before.get(file.name)
                self._seen[file.name] = seen if seen is not None and seen[0] == touched else (touched, now)
        return sorted(int(name) for name, (_, at) in self._seen.items() if now - at > self._timeout)


def dump_stacks_on_request() -> None:
    """Call in a worker: on DUMPING it writes the stacks of its threads to standard error."""
    if os.environ.get(_DIRECTORY):
        faulthandler.register(DUMPING, all_threads=True)


def beat(*, first: bool = False) -> None:
    """Call in a worker when it makes progress. The launcher watches it from the call with `first` on, until `end`."""
    if (file := _own_file()) is not None and (first or file.exists()):
        file.touch()


def end() -> None:
    """Call in a worker when its steps are done: the launcher stops watching it."""
    if (file := _own_file()) is not None:
        file.unlink(missing_ok=True)


def _own_file() -> Path | None:
    directory = os.environ.get(_DIRECTORY)
    return Path(directory) / os.environ["RANK"] if directory else None
