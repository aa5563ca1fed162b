"""Saving checkpoints in a background thread while training continues."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.torch_version import TorchVersion

log = logging.getLogger("powertrain")

_NOTEWORTHY_SECONDS = 10.0
_COPIES_ONCE = TorchVersion(torch.__version__) < "2.13"
"""Up to torch 2.12, a stager can be used for one copy only."""


class AsyncSaver:
    """Writes one checkpoint at a time in a thread.

    With more than one process, its collectives need a process group that training does not use: in the group of the
    training loop, the order of the collectives of both would differ from rank to rank.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self._stager = _new_stager()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._running: Future[bool] | None = None

    def start(self, tensors: dict[str, Any], write: Callable[[Any], bool]) -> None:
        """Copy `tensors`, start `write(copy)` in the thread, and return. `write` returns whether the save succeeded.

        Tensors on the CPU are copied too, because training changes them in place.
        """
        if _COPIES_ONCE:
            self._stager.close()
            self._stager = _new_stager()
        staged = self._stager.stage(tensors)  # blocks until every tensor is copied to main memory: the snapshot
        self._running = self._thread.submit(write, staged)

    def wait(self) -> bool | None:
        """Wait for the running save. Return the result of `write`, or None if none was started since the last call."""
        if self._running is None:
            return None
        future, self._running = self._running, None  # so that each result is returned once
        waited_from = time.monotonic()
        saved = future.result()
        if (seconds := time.monotonic() - waited_from) > _NOTEWORTHY_SECONDS:
            log.warning(
                f"training waited {seconds:.0f} s for the previous checkpoint to be written: the disk is too slow "
                "for this checkpoint.interval_steps; raise it"
            )
        return saved

    @property
    def is_busy(self) -> bool:
        """Whether a save is still being written on this rank."""
        return self._running is not None and not self._running.done()

    def close(self) -> None:
        self._thread.shutdown()
        self._stager.close()


def _new_stager() -> DefaultStager:
    """Return a stager. It reuses its buffers, pinned with CUDA, as long as the tensors that they copy exist."""
    cuda = torch.cuda.is_available()
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=cuda
        )
    )
