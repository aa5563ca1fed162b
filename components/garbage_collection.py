"""Python's garbage collector, run at the same step on every rank.

Left to itself it runs at another moment on each rank, and all wait for the one that collects: at 64 ranks some rank
does in almost every step.
"""

from __future__ import annotations

import gc


class GarbageCollection:
    """Collects every `interval_steps` steps; None leaves it to Python. What is there after the first step is kept."""

    def __init__(self, interval_steps: int | None) -> None:
        self.interval_steps = interval_steps
        self._taken_over = False

    def after_step(self, step: int) -> None:
        """Every rank calls it after each step, with the step's number."""
        if self.interval_steps is None:
            return
        if not self._taken_over:
            self._taken_over = gc.isenabled()
            gc.disable()
            gc.collect()
            gc.freeze()  # modules, model and optimizer: a million objects, which no later collection has to look at
        elif step % self.interval_steps == 0:
            gc.collect()

    def close(self) -> None:
        """Leave the collector as it was."""
        if self._taken_over:
            gc.unfreeze()
            gc.enable()
            self._taken_over = False
