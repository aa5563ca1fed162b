"""What saving and loading need to know of the processes of a run."""

from __future__ import annotations

from typing import Protocol


class Ranks(Protocol):
    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def is_main(self) -> bool: ...
    def barrier(self) -> None: ...
