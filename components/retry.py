"""Retries: repeats calls that fail, such as those to a server, in a thread; the end of a run limits the attempts."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable

log = logging.getLogger("powertrain")
FIRST_RETRY_SECONDS, MAX_RETRY_SECONDS = 1.0, 60.0
"""The time between two attempts; it doubles with each."""


class Retries:
    """The calls of one thread. Another thread calls `close` at the end of the run."""

    def __init__(self) -> None:
        self.failures, self.is_failing = 0, False
        self.closing = threading.Event()
        self._ends_at = math.inf

    def close(self, seconds: float) -> None:
        """From now on, make an attempt every `FIRST_RETRY_SECONDS`, the last one after `seconds`."""
        self._ends_at = time.monotonic() + seconds
        self.closing.set()

    @property
    def hangs(self) -> bool:
        """Whether the last attempt should have ended long ago."""
        return self.is_failing and time.monotonic() > self._ends_at + MAX_RETRY_SECONDS

    def call(
        self, do: Callable[[], bool | None], kind: type[Exception], failure: Callable[[Exception], str], recovery: str
    ) -> bool:
        """Call `do` until it does not raise `kind`; return whether that was before the end.

        Logs `failure(error)` for the first of several errors, and `recovery` afterwards. `do` returns False if it found
        that nothing was to be done, which is no recovery.
        """
        seconds = FIRST_RETRY_SECONDS
        while True:
            try:
                done = do()
            except kind as error:
                self.failures += 1
                if not self.is_failing:
                    self.is_failing = True
                    log.error(failure(error))
                if time.monotonic() >= self._ends_at:
                    return False
                if self.closing.wait(seconds):
                    time.sleep(FIRST_RETRY_SECONDS)
                else:
                    seconds = min(2 * seconds, MAX_RETRY_SECONDS)
            else:
                if self.is_failing and done is not False:
                    self.is_failing = False
                    log.warning(recovery)
                return True
