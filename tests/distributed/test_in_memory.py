"""Checkpoints in the memory of the nodes: what is left when nodes are lost, and how the others get it."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from components.atomic_files import remove_files
from components.checkpoint import CheckpointManager, in_memory, load_tensors, read_state, step_of
from components.checkpoint.in_memory import InMemoryCheckpoint
from components.distributed.context import DistributedContext
from tests.processes import call_in_ranks

WHOLE = {"a": torch.arange(35.0).reshape(7, 5), "b": torch.arange(6.0), "c": torch.tensor(3.0)}
NODES, PER_NODE = 3, 1


def join(rank: int) -> DistributedContext:
    os.environ["LOCAL_WORLD_SIZE"] = str(PER_NODE)
    dist.init_process_group(
        "gloo", init_method=os.environ["RENDEZVOUS"], rank=rank, world_size=int(os.environ["WORLD_SIZE"])
    )
    return DistributedContext.init("cpu")


def lose_nodes(rank: int, folder: Path) -> None:
    world = join(rank)
    mesh = init_device_mesh("cpu", (world.size,))
    memory = folder / f"node-{rank // PER_NODE}"
    memory.mkdir()

    def sharded(factor: float, dimension: int = 0) -> dict[str, dict[str, torch.Tensor]]:
        placements = {"a": [Shard(dimension)], "b": [Shard(0)], "c": [Replicate()]}
        return {"model": {name: distribute_tensor(WHOLE[name] * factor, mesh, placements[name]) for name in WHOLE}}

    def find(newer_than: int = -1) -> InMemoryCheckpoint | None:
        dist.barrier()
        return InMemoryCheckpoint.find(memory, world, newer_than=newer_than)

    def check(found: InMemoryCheckpoint | None, step: int) -> None:
        assert found is not None
        assert step_of(found.path) == step
        assert read_state(found.path)["step"] == step
        for dimension in (0, 1):  # the shards of a 7 x 5 matrix by columns are in the files of all ranks
            loaded = sharded(0, dimension)
            load_tensors(found.path, loaded, no_dist=False, fetch=found.fetch)
            for name, tensor in loaded["model"].items():
                assert torch.equal(tensor.full_tensor(), WHOLE[name] * step), (step, dimension, name)

    for asynchronous in (False, True):
        manager = CheckpointManager(folder / "disk", world, in_memory=memory, async_save=asynchronous)
        for step in (1, 2):
            manager.wait()
            assert manager.can_save_in_memory()
            manager.save_in_memory(step, sharded(step), {"step": step}, "")
        manager.close()
        assert manager.saved_step is None, "nothing is on disk"
        assert manager.failed_steps == []
        assert [path.name for path in memory.iterdir()] == ["step-00000002"], "only the newest is kept"
        assert len(list(memory.rglob("*.distcp"))) == 2, "its own file and that of the node before"
        assert find(newer_than=2) is None
        for path in memory.iterdir():
            assert not list(path.iterdir()), "one that is not used is removed"

    manager = CheckpointManager(folder / "disk", world, in_memory=memory)
    manager.save_in_memory(3, sharded(3), {"step": 3}, "")
    check(find(), 3)
    for lost in range(NODES):  # one after the other; what was fetched for the node before counts as held
        manager.save_in_memory(4 + lost, sharded(4 + lost), {"step": 4 + lost}, "")
        if rank == lost:
            shutil.rmtree(memory)
            memory.mkdir()
        check(find(), 4 + lost)
        check(find(), 4 + lost)

    busy = CheckpointManager(folder / "disk", world, in_memory=memory, async_save=True)
    assert busy._memory_writer is not None
    write, resumes = busy._memory_writer.write_step, threading.Event()
    if rank == 1:
        busy._memory_writer.write_step = lambda *args: resumes.wait() and write(*args)  # type: ignore[method-assign]
    state = {"step": 7, "counts": [1]}
    busy.save_in_memory(7, sharded(7), state, "")
    state["counts"].append(2)  # type: ignore[attr-defined]
    assert not busy.can_save_in_memory(), "one rank is still writing"
    resumes.set()
    busy.wait()
    assert busy.can_save_in_memory()
    busy.close()
    found = find()
    assert found is not None and read_state(found.path)["counts"] == [1], "as it was when the save began"
    manager.save_in_memory(6, sharded(6), {"step": 6}, "")

    def killed(path: Path, is_ours: Any) -> bool:
        (path / "files.json").unlink()
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_memory, "remove_files", killed if rank == 1 else remove_files)
        with pytest.raises(KeyboardInterrupt) if rank == 1 else nullcontext():
            in_memory.keep_only(memory, None)
    assert len(list(memory.glob(".removed-*"))) == (rank == 1), "it is not listed as a checkpoint any more"
    if rank == 2:  # half a checkpoint under its own name
        (memory / "step-00000005").mkdir()
    assert find() is None
    assert not list(memory.iterdir())
    manager.save_in_memory(6, sharded(6), {"step": 6}, "")

    writer = manager._memory_writer
    assert writer is not None
    complete = writer.finish_files

    def fail(*arguments: Any) -> None:
        complete(*arguments)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if rank == 1:
        writer.finish_files = fail  # type: ignore[method-assign]
    manager.save_in_memory(9, sharded(9), {"step": 9}, "")
    assert len(list(memory.iterdir())) == 1, "a save that fails takes no memory"
    check(find(), 6)

    writer.finish_files = complete  # type: ignore[method-assign]
    manager.save_in_memory(10, sharded(10), {"step": 10}, "")
    if rank in (0, 1):
        shutil.rmtree(memory)
        memory.mkdir()
    assert find() is None, "two neighbors are lost"
    manager.close()
    dist.destroy_process_group()


def test_all_files_are_left_when_one_node_is_lost(tmp_path):
    call_in_ranks(lose_nodes, tmp_path, NODES * PER_NODE)


def send_to_a_full_disk(rank: int, folder: Path) -> None:
    from components.checkpoint.file_transfer import Received, Sent, transfer

    join(rank)
    (folder / f"sent-{rank}").write_bytes(bytes([rank]) * (3 + 2**27))  # three pieces
    other, size = 1 - rank, 3 + 2**27
    target = folder / f"received-{rank}" if rank == 0 else Path("/dev/full")
    parts = Sent(folder / f"sent-{rank}", other), Received(target, size, other)
    if rank == 0:
        transfer(*parts, None)
        assert target.read_bytes() == bytes([1]) * size
    else:
        with pytest.raises(OSError, match="No space left"):
            transfer(*parts, None)
    dist.destroy_process_group()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_receiver_whose_disk_is_full_does_not_keep_the_sender_waiting(tmp_path):
    call_in_ranks(send_to_a_full_disk, tmp_path, 2)
