"""Stopping on request: a signal sets a flag, the loop reads it between steps."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any

CAUGHT = (signal.SIGINT, signal.SIGTERM)
ONE_REQUEST_SECONDS = 2.0
"""Signals this close together are one request: a scheduler signals a whole job, and a launcher passes its own on."""


class StopSignal:
    """Catches SIGINT and SIGTERM once; another one, later, acts at once, as if it had never been caught.

    `received` is the number of the signal, 0 while there was none. Use as a context manager: leaving it restores the
    handlers that were there before.
    """

    def __init__(self) -> None:
        self.received = 0
        self._at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in CAUGHT:
            self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._at = number, time.monotonic()
        elif time.monotonic() - self._at > ONE_REQUEST_SECONDS:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
