"""Collectives, timeouts and errors of real processes."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from components.distributed import context
from components.distributed.context import DistributedContext
from components.errors import InputError
from tests.processes import call_in_ranks

SHORT = timedelta(seconds=2)


def join(rank: int, folder: Path, timeout: timedelta = context.COLLECTIVE_TIMEOUT) -> DistributedContext:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    context.COLLECTIVE_TIMEOUT = timeout
    dist_init = dist.init_process_group
    # both have joined before the timeout of either starts: a busy machine starts them at different times
    Path(folder, str(rank)).touch()
    while not Path(folder, str(1 - rank)).exists():
        time.sleep(0.01)
    dist.init_process_group = lambda backend, timeout: dist_init(
        backend, init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timeout
    )
    return DistributedContext.init("cpu")


def wait_for_main(rank: int, folder: Path) -> None:
    joined = join(rank, folder, SHORT)
    assert joined.main_process_first(lambda: time.sleep(4 if rank == 0 else 0) or rank) == rank

    def fail(who: int, error: Exception) -> int:
        if rank == who:
            raise error
        return rank

    for who in (0, 1):
        suffix = "" if rank == who else rf" \(rank {who}\)"
        with pytest.raises(ValueError, match=rf"^path: no text{suffix}$"):
            joined.main_process_first(partial(fail, who, InputError("path", "no text")))
        with pytest.raises(ZeroDivisionError if rank == who else RuntimeError, match="by hand"):
            joined.main_process_first(partial(fail, who, ZeroDivisionError("by hand")))
    done: list[int] = []
    joined.on_main_process(lambda: time.sleep(4) or done.append(rank))
    assert done == [0] * joined.is_main
    with pytest.raises(ValueError, match=r"^path: no text" + ("$" if rank == 0 else r" \(rank 0\)$")):
        joined.on_main_process(partial(fail, 0, InputError("path", "no text")))
    joined.close()


def test_work_of_the_main_process_may_take_longer_than_a_collective(tmp_path):
    call_in_ranks(wait_for_main, tmp_path, 2)


def say(rank: int, folder: Path) -> None:
    joined = join(rank, folder)
    assert joined.all_equal("the same") and not joined.all_equal(f"of rank {rank}")
    assert joined.gather(f"of rank {rank}") == ["of rank 0", "of rank 1"]
    replace(joined, device=torch.device("cuda")).close_unless_failed(ValueError)
    assert dist.is_initialized(), "a process that failed alone would wait for the others in there"
    joined.close_unless_failed(ValueError)
    assert not dist.is_initialized()


def test_collectives_of_small_values(tmp_path):
    call_in_ranks(say, tmp_path, 2)


def run_late(rank: int, folder: Path) -> None:
    joined = join(rank, folder, SHORT)
    if rank == 0:
        time.sleep(4)
    with pytest.raises(RuntimeError):
        joined.all_reduce_max(rank)
    os._exit(0)  # gloo aborts a process that leaves it in this state


def test_a_collective_times_out(tmp_path):
    """Otherwise the test above would prove nothing."""
    call_in_ranks(run_late, tmp_path, 2)


def shorten(rank: int, folder: Path) -> None:
    joined = join(rank, folder, SHORT)
    assert joined.long_timeout_group is not None and joined.nodes == 1
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft == hard, "a run of 512 processes opens more sockets than a shell usually allows"
    joined.shorten_timeouts()
    if rank == 0:
        time.sleep(4)
    with pytest.raises(RuntimeError):
        joined.main_process_first(lambda: None)
    os._exit(0)  # gloo aborts a process that leaves it in this state


def test_timeouts_are_shorter_after_the_first_step(tmp_path):
    call_in_ranks(shorten, tmp_path, 2)
