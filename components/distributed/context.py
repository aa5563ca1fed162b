"""The processes of a run: who this one is, and the few numbers that all of them must agree on."""

from __future__ import annotations

import hashlib
import os
import resource
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from components.distributed.collectives import all_gather_str, raise_on_all_ranks, try_call

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""For a collective in which all processes take part at once; one that takes longer is taken for hung."""
MAIN_PROCESS_TIMEOUT = timedelta(days=7)
"""For what the main process does alone, such as preparing a corpus."""
TRAINING_TIMEOUT = timedelta(minutes=10)
"""For collectives between devices after the first step: nothing that lies between two of them takes this long, and a
hang holds every device of the run until it is noticed."""


@dataclass(frozen=True)
class DistributedContext:
    """One process among `size`. A single process has no process group, and every collective is the identity."""

    rank: int
    size: int
    device: torch.device
    joined: bool = False
    waiting: dist.ProcessGroup | None = None
    """A gloo group beside the default one. During set-up processes wait in it for the main one; from then on it belongs
    to the thread that writes checkpoints. One group for both: each costs a process two sockets for every other."""
    local_size: int = 1
    """Processes of this node."""

    @classmethod
    def start(cls, wanted: Literal["auto", "cpu", "cuda"]) -> DistributedContext:
        """Join the processes torchrun started, if it did. `auto`: on GPUs if there are any.

        Raises ValueError when a GPU is asked for and there is none, or fewer than local processes.
        """
        if wanted == "cuda" and not torch.cuda.is_available():
            raise ValueError("cuda: this machine shows no CUDA device; use --run.device=cpu or auto")
        device_type = "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        raise_descriptor_limit()
        local = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device(device_type)
        if device_type == "cuda":
            if local >= torch.cuda.device_count():
                raise ValueError(f"process {local} of this node has no GPU: {torch.cuda.device_count()} visible")
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        joins = size > 1 and not dist.is_initialized()
        if joins:
            backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
        waiting = dist.new_group(backend="gloo", timeout=MAIN_PROCESS_TIMEOUT) if size > 1 else None
        # torchrun and our launcher set it; other starters of processes may not, and then all count as one node
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or size)
        return cls(rank, size, device, joins, waiting, local_size)

    def stop(self) -> None:
        """Leave the process group, if `start` joined it: one that was there before is its owner's."""
        if self.joined and dist.is_initialized():
            dist.destroy_process_group()

    def stop_unless_failed(self, kind: type[BaseException] | None, *error: object) -> None:
        """`stop`, as the `__exit__` of a context; on GPUs after a good end only.

        NCCL takes a group down together: a process that fails alone would wait here for the others, which wait for it
        in some collective, and its error would never be told. It ends with the process.
        """
        if kind is None or self.device.type != "cuda":
            self.stop()

    def shorten_timeouts(self) -> None:
        """Every process calls it after the first step, when compiling, preparing data and reading weights are over.

        Collectives on devices are then given up after TRAINING_TIMEOUT. Those between processors keep PATIENCE, which a
        save may need, and `waiting` comes down to it: a save that hangs is not waited for as long as a corpus.
        """
        if self.waiting is not None:
            set_timeout([self.waiting], torch.device("cpu"), COLLECTIVE_TIMEOUT)
        if self.size > 1 and self.device.type == "cuda":
            set_timeout(list(dist.distributed_c10d._world.pg_map), self.device, TRAINING_TIMEOUT)

    @property
    def nodes(self) -> int:
        """Machines that the processes run on."""
        return max(1, self.size // self.local_size)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor` added over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def maximum(self, value: int) -> int:
        """The largest `value` of all processes."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor)

    def agree(self, text: str) -> bool:
        """Whether `text` is the same in all processes."""
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        return self.maximum(number) == -self.maximum(-number)

    def gather(self, text: str) -> list[str]:
        """`text` of every process, by rank."""
        return [text] if self.size == 1 else all_gather_str(text)

    def barrier(self) -> None:
        """Wait for every process."""
        if self.size > 1:
            # a reduction on the CPU: unlike dist.barrier it needs no device and no NCCL communicator
            dist.all_reduce(torch.zeros(1))

    def main_first(self, work: Callable[[], T]) -> T:
        """`work()` on the main process, then on the others, which find what it left. An error on one is raised on all.

        For work whose result is kept on disk, such as preparing data. Bad input on one process is bad input on all.
        """
        if self.size == 1:
            return work()
        result: T | None = None
        failure: Exception | None = None
        wait = partial(all_gather_str, group=self.waiting)
        if self.is_main:
            result, failure = try_call(work)
        raise_on_all_ranks(failure, wait)
        if not self.is_main:
            result, failure = try_call(work)
        raise_on_all_ranks(failure, wait)
        return result  # type: ignore[return-value]


def raise_descriptor_limit() -> None:
    """Raise the limit of open files of this process to the highest it may have.

    Two gloo groups of 512 processes are more sockets than the usual limit of 1,024.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS names a limit that it does not allow
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def set_timeout(groups: Iterable[dist.ProcessGroup], device: torch.device, timeout: timedelta) -> None:
    """Give up collectives of `groups` on tensors of `device` that start from now on after `timeout`."""
    for group in groups:
        # not dist.distributed_c10d._set_pg_timeout, which would change those of the processors with those of the GPUs
        if device.type in {kind.type for kind in group._device_types}:
            group._get_backend(device)._set_default_timeout(timeout)
