"""Run Python's garbage collector at the same step on every rank.

By default it runs at different times on each rank, and all ranks wait for the one that collects: with 64 ranks that
happens in almost every step.
"""

from __future__ import annotations

import gc


def resume_after_imports() -> None:
    """Enable the collector if the program began with `gc.disable()`, and exclude all objects that exist now.

    Importing PyTorch creates about a million permanent objects; traversing them repeatedly takes half a second of a
    start, and as much again at the next collection.
    """
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


class GarbageCollection:
    """Collects every `interval_steps` steps, except objects of the first step; None leaves it to Python."""

    def __init__(self, interval_steps: int | None) -> None:
        self.interval_steps = interval_steps
        self._taken_over = False

    def after_step(self, step: int) -> None:
        """Call on every rank after each step, with the number of the step."""
        if self.interval_steps is None:
            return
        if not self._taken_over:
            self._taken_over = gc.isenabled()
            gc.disable()
            gc.collect()
            gc.freeze()  # modules, model and optimizer: a million objects, which later collections then skip
        elif step % self.interval_steps == 0:
            gc.collect()

    def close(self) -> None:
        """Restore the previous state of the collector."""
        if self._taken_over:
            gc.unfreeze()
            gc.enable()
            self._taken_over = False
