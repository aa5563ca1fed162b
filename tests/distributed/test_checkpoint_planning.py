"""Several processes read the metadata of a checkpoint once and plan a save once, for all of them."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from components.checkpoint import CheckpointManager, load_tensors
from components.checkpoint.metadata_unpickler import read_index
from tests.components.distributed.test_context import join
from tests.processes import call_in_ranks

WHOLE = {"a": torch.arange(35.0).reshape(7, 5), "b": torch.arange(6.0), "c": torch.tensor(3.0)}


def save_and_load(rank: int, folder: Path) -> None:
    world = join(rank, folder)
    mesh = init_device_mesh("cpu", (2,))
    planned: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: planned.append(record.getMessage())
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.checkpoint"):
            logging.getLogger(name).addHandler(handler)
            logging.getLogger(name).setLevel(logging.INFO)

    def sharded(factor: float, dimension: int = 0, **more: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
        placements = {"a": [Shard(dimension)], "b": [Shard(0)], "c": [Replicate()]}
        whole = {name: distribute_tensor(WHOLE[name] * factor, mesh, placements[name]) for name in WHOLE}
        return {"model": whole | more}

    def reused() -> bool:
        found = any("No change in the local plan" in line for line in planned)
        planned.clear()
        return found

    store = CheckpointManager(folder / "checkpoints", world, async_save=True)
    expected = {}
    for step, tensors, again in (
        (1, sharded(1), False),
        (2, sharded(2), True),
        (3, sharded(3, dimension=1), False),
        (4, sharded(4, dimension=1, **({"only": torch.ones(2)} if rank == 1 else {})), rank == 0),
        (5, sharded(5, dimension=1, **({"only": torch.ones(2)} if rank == 1 else {})), True),
    ):
        store.save(step, tensors, {}, "")
        store.wait()
        assert store.saved_step == step
        assert reused() == again, f"save {step}"
        expected[step] = {name: tensor * step for name, tensor in WHOLE.items()}
    store.close()

    opened: list[str] = []
    sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)
    for step, whole in expected.items():
        for dimension in (0, 1):
            loaded = sharded(0, dimension)
            opened.clear()
            load_tensors(store.path(step), loaded, no_dist=False)
            assert sum(path.endswith(".metadata") for path in opened) == (rank == 0), "the first process reads for all"
            for name, tensor in loaded["model"].items():
                assert torch.equal(tensor.full_tensor(), whole[name]), (step, dimension, name)
    if rank == 0:
        (store.path(1) / ".metadata").write_bytes(b"\x80\x04cos\nsystem\n.")
    with pytest.raises(ValueError, match="which is not allowed in metadata" + ("" if rank == 0 else r" \(rank 0\)")):
        load_tensors(store.path(1), sharded(0), no_dist=False)
    world.close()


def test_metadata_is_read_once_and_a_save_is_planned_once(tmp_path):
    call_in_ranks(save_and_load, tmp_path, 2)
    index = read_index(tmp_path / "checkpoints" / "step-00000002")
    local = index.metadata({"model.a": WHOLE["a"][:2]})
    assert set(local.state_dict_metadata) == {"model.a"}
    assert [tuple(chunk.sizes) for chunk in local.state_dict_metadata["model.a"].chunks] == [(4, 5)]
    assert len(local.storage_data) == 1, "a rank makes no objects of chunks that others read"
