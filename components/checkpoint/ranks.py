"""What saving and loading need to know of the processes of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch.distributed as dist

from components.processes import attempt, raise_in_all


class Ranks(Protocol):
    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def is_main(self) -> bool: ...
    @property
    def waiting(self) -> dist.ProcessGroup | None: ...
    def gather(self, text: str) -> list[str]: ...


def together(work: Callable[[], None], gather: Callable[[str], list[str]]) -> None:
    """`work()` on every rank, and none goes on before all have ended. An error on one is an error on all."""
    _, failure = attempt(work)
    raise_in_all(failure, gather)
