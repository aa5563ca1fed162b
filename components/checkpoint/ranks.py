"""What saving and loading need to know of the processes of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Ranks(Protocol):
    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def is_main(self) -> bool: ...
    def maximum(self, value: int) -> int: ...


def together(work: Callable[[], None], maximum: Callable[[int], int]) -> None:
    """`work()` on every rank, and none goes on before all have ended. An error on one is an error on all."""
    failure: Exception | None = None
    try:
        work()
    except Exception as error:
        failure = error
    if maximum(int(failure is not None)):
        raise failure or OSError("another process failed; its message is with it")
