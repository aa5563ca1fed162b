"""The processes of a run: rank, device, process groups, and collectives of small values over all of them."""

from __future__ import annotations

import hashlib
import os
import resource
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from components.distributed.collectives import all_gather_object, raise_on_all_ranks, try_call
from components.distributed.worker import report_connected

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Timeout of collectives that all processes enter at about the same time; a longer one is considered hung."""
MAIN_PROCESS_TIMEOUT = timedelta(days=7)
"""Timeout for work of the main process alone, such as preparing a corpus."""
TRAINING_TIMEOUT = timedelta(minutes=10)
"""Timeout of collectives between devices after the first step. No work between two of them takes this long, and a hang
occupies every device of the run until it is detected."""


@dataclass(frozen=True)
class DistributedContext:
    """This process among `size`. A single process has no process group, and every collective is the identity."""

    rank: int
    size: int
    device: torch.device
    owns_group: bool = False
    """Whether `init` created the default process group, so that `close` destroys it."""
    long_timeout_group: dist.ProcessGroup | None = None
    """A second gloo group with MAIN_PROCESS_TIMEOUT. During setup, processes wait in it for the main process; then the
    checkpoint thread uses it. One group serves both, because each costs two sockets per pair of processes."""
    local_size: int = 1
    """Number of processes on this node."""

    @classmethod
    def init(cls, wanted: Literal["auto", "cpu", "cuda"]) -> DistributedContext:
        """Join the processes that torchrun or our launcher started, if any; `auto` uses a GPU if there is one.

        Raises ValueError if "cuda" is wanted without a GPU, or if the node has fewer GPUs than processes.
        """
        if wanted == "cuda" and not torch.cuda.is_available():
            raise ValueError("cuda: this machine has no CUDA device; use --run.device=cpu or auto")
        device_type = "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        raise_descriptor_limit()
        local = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device(device_type)
        if device_type == "cuda":
            if local >= torch.cuda.device_count():
                raise ValueError(
                    f"process {local} of this node has no GPU: {torch.cuda.device_count()} are visible; start fewer"
                )
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        owns_group = size > 1 and not dist.is_initialized()
        if owns_group:
            backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
        long_timeout_group = dist.new_group(backend="gloo", timeout=MAIN_PROCESS_TIMEOUT) if size > 1 else None
        report_connected()
        # torchrun and our launcher set it; with another launcher all processes may count as one node
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or size)
        return cls(rank, size, device, owns_group, long_timeout_group, local_size)

    def close(self) -> None:
        """Destroy the process group if `init` created it; an existing one belongs to the caller."""
        if self.owns_group and dist.is_initialized():
            dist.destroy_process_group()

    def close_unless_failed(self, kind: type[BaseException] | None, *error: object) -> None:
        """Call `close`, as the `__exit__` of a context; on GPUs only if there was no error.

        NCCL destroys a group collectively: a process that failed alone would wait here for the others, which wait for
        it in another collective, and its error would never be reported. After an error the group ends with the process.
        """
        if kind is None or self.device.type != "cuda":
            self.close()

    def shorten_timeouts(self) -> None:
        """Shorten the timeouts. Call on every process after the first step, when compilation and setup are done.

        Collectives between devices then time out after TRAINING_TIMEOUT. Those on CPUs keep COLLECTIVE_TIMEOUT, which a
        save may need; `long_timeout_group` is reduced to it too, because only checkpoints use it from now on.
        """
        if self.long_timeout_group is not None:
            set_timeout([self.long_timeout_group], torch.device("cpu"), COLLECTIVE_TIMEOUT)
        if self.size > 1 and self.device.type == "cuda":
            set_timeout(list(dist.distributed_c10d._world.pg_map), self.device, TRAINING_TIMEOUT)

    @property
    def nodes(self) -> int:
        """Number of nodes of the run."""
        return max(1, self.size // self.local_size)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the process that writes files and logs."""
        return self.rank == 0

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over all processes, in place, and return it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_max(self, value: int) -> int:
        """Return the largest `value` of all processes."""
        return int(self.all_reduce_maxima(torch.tensor(value)))

    def start_all_reduce_max(self, value: int) -> Callable[[], int]:
        """Start `all_reduce_max`, and return a function that waits for its result."""
        tensor = torch.tensor(value)
        work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, async_op=True) if self.size > 1 else None

        def wait() -> int:
            if work is not None:
                work.wait()
            return int(tensor)

        return wait

    def all_reduce_maxima(self, tensor: Tensor) -> Tensor:
        """Take the element-wise maximum of `tensor` over all processes, in place, and return it."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def all_equal(self, text: str) -> bool:
        """Return whether `text` is equal on all processes."""
        # equal if the maximum and the minimum of its hash are
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        return self.all_reduce_max(number) == -self.all_reduce_max(-number)

    def gather(self, value: T) -> list[T]:
        """Return the `value` of every process, in order of rank."""
        return [value] if self.size == 1 else all_gather_object(value)

    def barrier(self) -> None:
        """Wait until every process has called it."""
        if self.size > 1:
            # unlike dist.barrier, a reduction on the CPU needs no device and no NCCL communicator
            dist.all_reduce(torch.zeros(1))

    def main_process_first(self, work: Callable[[], T]) -> T:
        """Call `work` on the main process, then on the others, and return each one's result.

        For work that leaves its result on disk, such as preparing data. An error on one process is raised on all.
        """
        if self.size == 1:
            return work()
        result, failure = try_call(work) if self.is_main else (None, None)
        raise_on_all_ranks(failure, self._gather_with_long_timeout)
        if not self.is_main:
            result, failure = try_call(work)
        raise_on_all_ranks(failure, self._gather_with_long_timeout)
        return result  # type: ignore[return-value]

    def on_main_process(self, work: Callable[[], None]) -> None:
        """Call `work` on the main process, and wait for it on the others. An error is raised on all processes."""
        _, failure = try_call(work) if self.is_main else (None, None)
        raise_on_all_ranks(failure, self._gather_with_long_timeout)

    def _gather_with_long_timeout(self, value: T) -> list[T]:
        """Return the `value` of every process, in order of rank; for work that may take long on one of them."""
        return [value] if self.size == 1 else all_gather_object(value, self.long_timeout_group)


def raise_descriptor_limit() -> None:
    """Raise this process's limit of open files to the hard limit.

    Two gloo groups of 512 processes need more sockets than the usual soft limit of 1,024.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS reports a hard limit that it does not accept
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def set_timeout(groups: Iterable[dist.ProcessGroup], device: torch.device, timeout: timedelta) -> None:
    """Set the timeout of later collectives of `groups` on tensors of `device`."""
    for group in groups:
        # not dist.distributed_c10d._set_pg_timeout, which would change the gloo backend together with NCCL
        if device.type in {kind.type for kind in group._device_types}:
            group._get_backend(device)._set_default_timeout(timeout)
