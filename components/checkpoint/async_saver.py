"""Saving while training goes on."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.torch_version import TorchVersion

from components.checkpoint.load import NO_DIST_WARNING
from components.distributed.collectives import all_gather_str

log = logging.getLogger("powertrain")

_NOTEWORTHY_SECONDS = 10.0
_COPIES_ONCE = TorchVersion(torch.__version__) < "2.13"
"""Up to torch 2.12 a stager takes itself apart after a copy, and fails at the next."""


class AsyncSaver:
    """Writes one checkpoint at a time in a thread.

    Its collectives need a process group that training does not use, where there is more than one process: on the
    training loop's they would meet that loop's, in an order that differs from rank to rank.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        if group is None:
            warnings.filterwarnings("ignore", message=NO_DIST_WARNING)  # for good: a thread must not change and restore
        self._stager = _new_stager()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._under_way: Future[bool] | None = None

    def start(self, tensors: dict[str, Any], write: Callable[[Any], bool]) -> None:
        """Copy `tensors`, then return; in the thread `write` the copy, which tells whether it could.

        The copy is a snapshot also on the CPU, whose tensors training goes on to change in place.
        """
        if _COPIES_ONCE:
            self._stager.close()
            self._stager = _new_stager()
        staged = self._stager.stage(tensors)
        self._under_way = self._thread.submit(write, staged)

    def wait(self) -> bool | None:
        """Until no save is under way; what the last `write` told, None if there was none since the last call."""
        if self._under_way is None:
            return None
        future, self._under_way = self._under_way, None
        waited_from = time.monotonic()
        saved = future.result()
        if (seconds := time.monotonic() - waited_from) > _NOTEWORTHY_SECONDS:
            log.warning(
                f"training waited {seconds:.0f} s for the checkpoint before: the disk is slower than "
                "checkpoint.interval_steps asks for"
            )
        return saved

    def gather(self, text: str) -> list[str]:
        """`text` of every process, by rank, over a group that the training loop does not use."""
        return [text] if self.group is None else all_gather_str(text, self.group)

    def close(self) -> None:
        self._thread.shutdown()
        self._stager.close()


def _new_stager() -> DefaultStager:
    """It keeps its buffers, pinned where that speeds up the copy, for as long as the tensors they mirror live."""
    cuda = torch.cuda.is_available()
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=cuda
        )
    )
