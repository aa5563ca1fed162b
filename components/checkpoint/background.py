"""Saving while training goes on."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from components.checkpoint.errors import SaveError
from components.checkpoint.reading import ALONE_WARNING

log = logging.getLogger("powertrain")


class Background:
    """Writes one checkpoint at a time in a thread.

    Its collectives have a process group of their own: on the training loop's they would meet that loop's, in an order
    that differs from rank to rank.
    """

    def __init__(self, *, distributed: bool) -> None:
        self.group = dist.new_group(backend="gloo") if distributed else None
        if not distributed:
            warnings.filterwarnings("ignore", message=ALONE_WARNING)  # for good: a thread must not change and restore
        cuda = torch.cuda.is_available()
        # It keeps its buffers, pinned where that speeds up the copy, for as long as the tensors they mirror live.
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=cuda
            )
        )
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._under_way: tuple[Path, Future[None]] | None = None

    def save(self, aside: Path, tensors: dict[str, Any], final: Path, complete: Callable[[], None]) -> None:
        """Copy `tensors`, then return; in the thread write them to `aside` and call `complete`.

        The copy is a snapshot also on the CPU, whose tensors training goes on to change in place.
        """
        staged = self._stager.stage(tensors)
        self._under_way = final, self._thread.submit(self._write, aside, staged, final, complete)

    def wait(self) -> None:
        """Until no save is under way. Raises SaveError when the last one failed."""
        if self._under_way is None:
            return
        final, future = self._under_way
        self._under_way = None
        try:
            future.result()
        except Exception as error:
            raise SaveError(f"{final} could not be saved: {error}") from error

    def close(self) -> None:
        self._thread.shutdown()
        self._stager.close()

    def _write(self, aside: Path, staged: Any, final: Path, complete: Callable[[], None]) -> None:
        try:
            dcp.save(staged, checkpoint_id=aside, process_group=self.group, no_dist=self.group is None)
            complete()
        except Exception as error:
            log.error(f"{final} could not be saved: {error}")
            with suppress(RuntimeError):  # the others may be gone
                self._any_failed(True)
            raise
        if self._any_failed(False):
            raise RuntimeError("another process failed; its message is with it")
        log.info(f"saved {final}")

    def _any_failed(self, failed: bool) -> bool:
        """Whether it failed on any rank."""
        if self.group is not None:
            flag = torch.tensor(int(failed))
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group)
            failed = bool(flag)
        return failed
