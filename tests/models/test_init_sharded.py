"""Four processes, each with its shard, have exactly the weights of one process, with any sharding."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from models.decoder import Decoder
from models.init import copy_sharded
from models.presets import LlamaShape
from tests.processes import call_in_ranks

SIZE = LlamaShape(dim=24, layers=2, heads=4, kv_heads=2, ffn_dim=44)
V = 53  # odd: the last shard of a dimension is smaller
SEED = 7
LAYOUTS = ("four shards", "two replicas of two shards", "two shards of two tensor-parallel shards")


def direct() -> dict[str, torch.Tensor]:
    model = Decoder(SIZE, V)
    model.init_weights(SEED)
    return model.state_dict()


def on_meta() -> Decoder:
    with torch.device("meta"):
        return Decoder(SIZE, V)


def fsdp(model: Decoder, mesh) -> None:
    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def sharded(layout: str) -> Decoder:
    model = on_meta()
    if layout == "four shards":
        fsdp(model, init_device_mesh("cpu", (4,)))
    elif layout == "two replicas of two shards":
        fsdp(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    else:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        out, into = ColwiseParallel(), RowwiseParallel()
        for layer in model.layers.values():
            plan = {"attention.wq": out, "attention.wk": out, "attention.wv": out, "attention.wo": into}
            plan |= {"feed_forward.w_gate": out, "feed_forward.w_up": out, "feed_forward.w_down": into}
            parallelize_module(layer, mesh["tp"], plan)
        fsdp(model, mesh["dp"])
    return model


def check(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=4)
    try:
        expected = direct()
        for layout in LAYOUTS:
            model = sharded(layout)
            model.to_empty(device="cpu")
            for parameter in model.parameters():
                torch.nn.init.constant_(parameter, float("nan"))
            model.init_weights(SEED)
            for name, parameter in model.named_parameters():
                assert isinstance(parameter, DTensor), f"{layout}: {name}"
                assert torch.equal(parameter.full_tensor(), expected[name]), f"{layout}: {name} {parameter.placements}"

        mesh, full = init_device_mesh("cpu", (4,)), torch.arange(70.0).reshape(10, 7)
        for placement in (Shard(0), Shard(1), Replicate()):
            for dtype in (torch.float32, torch.bfloat16):
                target = distribute_tensor(torch.zeros(10, 7, dtype=dtype), mesh, [placement])
                copy_sharded(target, full)
                assert torch.equal(target.full_tensor(), full.to(dtype)), (placement, dtype)
    finally:
        dist.destroy_process_group()


def test_every_sharding_starts_from_the_weights_of_one_process(tmp_path):
    call_in_ranks(check, tmp_path, 4)  # one start of processes for all layouts: it takes longer than they do
