"""The gradients of every variant of the decoder on every layout, against one process; pairs of variants are covered."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from components.distributed.parallel_dims import MeshShape, ParallelDims
from models.decoder import Decoder
from models.llama import Llama
from models.mup import MuPConfig
from models.presets import LlamaShape
from models.rope import RopeScaling
from recipes.initial_weights import copy_sharded
from recipes.parallelize import materialize, parallelize
from tests.models.variants import combined_shapes, shape_with
from tests.processes import call_in_ranks

pytestmark = [pytest.mark.filterwarnings("ignore:torch.distributed is disabled"), pytest.mark.timeout(600)]

MESHES = {2: [(1, 1, 1, 2), (1, 1, 2, 1)], 4: [(1, 2, 1, 2), (1, 1, 1, 4), (1, 1, 2, 2), (1, 1, 4, 1)]}
"""Processes -> meshes, (dp_replicate, dp_shard, cp, tp)."""
SMALL = LlamaShape(dim=24, layers=2, heads=4, kv_heads=4, head_dim=8, ffn_dim=12)
SHAPES = {
    **combined_shapes(SMALL),
    "experts": shape_with(
        replace(SMALL, experts=4, top_k=2), "norm of each head", "norms before and after", "window", "GeGLU"
    ),
}
V, B, T = 18, 2, 16


def config_of(shape: LlamaShape) -> Llama:
    keys = {
        key: value for key, value in asdict(shape).items() if key not in ("mup", "rope_scaling") and value is not None
    }
    if not shape.experts:
        del keys["top_k"]
    scaling = shape.rope_scaling and RopeScaling(**asdict(shape.rope_scaling))
    return Llama(**keys, rope_scaling=scaling, mup=MuPConfig(enabled=False), z_loss_coefficient=0.01)


def gradients(rank: int, mesh_shape: MeshShape, shape: LlamaShape) -> dict[str, torch.Tensor]:
    """Return the loss and the gradient of every parameter, whole. All data-parallel ranks have the same tokens, and
    their gradients are summed."""
    world = SimpleNamespace(rank=rank, size=mesh_shape.world_size, device=torch.device("cpu"))
    config = config_of(shape)
    with torch.device("meta"):
        model: Decoder = config.build(vocab_size=V, sequence_length=T)
    parallelize(model, config, ParallelDims(world, mesh_shape), torch.float32, world.device)
    materialize(model, world.device)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):  # gains that differ, the same on every layout
            whole = torch.empty(parameter.shape).uniform_(-0.3, 0.3, generator=generator)
            whole += 0 if shape.zero_centered_norm else 1
            copy_sharded(parameter, whole)
    tokens = torch.randint(V, (B, T + 1), generator=generator)
    loss = model(tokens[:, :-1], tokens[:, 1:])
    (loss / mesh_shape.dp_size).backward()
    found = {
        name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for name, p in model.named_parameters()
    }
    return {"loss": loss.detach(), **found}


def compute_in_ranks(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    meshes = [MeshShape(*mesh) for mesh in json.loads((folder / "meshes.json").read_text())]
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=meshes[0].world_size
    )
    for mesh in meshes:
        for name, shape in SHAPES.items():
            found = gradients(rank, mesh, shape)
            if rank == 0:
                torch.save(found, folder / f"{'-'.join(map(str, mesh))}-{name}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("processes", MESHES)
def test_gradients_on_every_layout_are_those_of_one_process(processes, tmp_path):
    (tmp_path / "meshes.json").write_text(json.dumps(MESHES[processes]))
    call_in_ranks(compute_in_ranks, tmp_path, processes)
    for name, shape in SHAPES.items():
        expected = gradients(0, MeshShape(1, 1, 1, 1), shape)
        for mesh in MESHES[processes]:
            found = torch.load(tmp_path / f"{'-'.join(map(str, mesh))}-{name}.pt")
            torch.testing.assert_close(found.pop("loss"), expected["loss"], rtol=1e-6, atol=0)
            for key, grad in found.items():
                difference = (grad - expected[key]).norm() / expected[key].norm()
                assert difference < 1e-5, (name, mesh, key, float(difference))
