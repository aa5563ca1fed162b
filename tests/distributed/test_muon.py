"""Updates on every layout: of Muon against a float64 reference for one matrix at a time, and equal in all replicas."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import distribute_tensor

from components.distributed.parallel_dims import MeshShape, ParallelDims
from components.optimizers import AdamW, Muon
from components.optimizers.adamw import local_tensor
from models.llama import Llama
from recipes.parallelize import materialize, parallelize
from tests.components.optimizers.muon_reference import MuonReference
from tests.processes import call_in_ranks

pytestmark = [pytest.mark.filterwarnings("ignore:torch.distributed is disabled"), pytest.mark.timeout(600)]

STEPS, LR, DECAY = 3, 0.02, 0.1
EQUAL = 1e-5
"""Relative to the largest element: three float32 iterations of five steps differ from float64 by 2e-6 here."""
MESHES = {
    2: [(2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 1, 2)],
    4: [(1, 4, 1, 1), (2, 2, 1, 1), (1, 2, 1, 2), (2, 1, 1, 2), (1, 1, 1, 4)],
}
"""Processes -> meshes, (dp_replicate, dp_shard, cp, tp)."""
# 20 and 12 rows over 4 ranks are equal shards, 6 experts are not; kv_heads = 4 lets 4 TP ranks split the heads
DENSE = {"dim": 20, "layers": 3, "heads": 4, "kv_heads": 4, "head_dim": 4, "ffn_dim": 12}
EXPERTS = {**DENSE, "ffn_dim": 8, "experts": 6, "top_k": 2}
# 18 and 10 rows over 4 shards are not equal, and of 6 experts, w_gate_up is divided into 2, 2, 2 and none
UNEVEN = {**DENSE, "dim": 18, "ffn_dim": 10}
UNEVEN_EXPERTS = {**EXPERTS, "dim": 18, "ffn_dim": 7}
CASES = {
    "dense": (DENSE, {}),
    "dense, normuon": (DENSE, {"variant": "normuon"}),
    "experts": (EXPERTS, {}),
    "experts, normuon": (EXPERTS, {"variant": "normuon"}),
    "per head": (DENSE, {"per_head": True, "lr_scale": "spectral"}),
    "uneven shards": (UNEVEN, {}),
    "uneven shards of experts, normuon": (UNEVEN_EXPERTS, {"variant": "normuon"}),
}


def cases_on(mesh: Sequence[int]) -> list[str]:
    """Return the cases that are compared on `mesh`: uneven shards where 4 ranks shard, since TP needs equal ones."""
    return [case for case in CASES if "uneven" not in case or tuple(mesh) == (1, 4, 1, 1)]


def muon(keys: dict) -> Muon:
    return Muon(weight_decay=DECAY, coefficients="quintic", **keys)


def gradient(name: str, shape: torch.Size, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + sum(map(ord, name)))
    return torch.randn(shape, generator=generator)


def train(rank: int, mesh_shape: MeshShape, shape: dict, optimizer: AdamW) -> tuple[Llama, torch.optim.Optimizer]:
    """Take the steps on this layout, and return the model and its optimizer."""
    world = SimpleNamespace(rank=rank, size=mesh_shape.world_size, device=torch.device("cpu"))
    config = Llama(**shape)
    with torch.device("meta"):
        model = config.build(vocab_size=16, sequence_length=8)
    mesh = ParallelDims(world, mesh_shape)
    parallelize(model, config, mesh, torch.float32, world.device)
    materialize(model, world.device)
    model.init_weights(0)
    built = optimizer.build(model=model)
    for step in range(STEPS):
        for name, parameter in model.named_parameters():
            whole = gradient(name, parameter.shape, step)
            placed = hasattr(parameter, "placements")
            parameter.grad = (
                distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
                if placed
                else whole
            )
        for group in built.param_groups:
            group["lr"] = LR * group["lr_multiplier"]
        built.step()
    return model, built


def whole_parameters(model: Llama) -> dict[str, torch.Tensor]:
    return {
        name: (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach()
        for name, parameter in model.named_parameters()
    }


def replicas(model: Llama, optimizer: torch.optim.Optimizer) -> dict[str, list[list[torch.Tensor]]]:
    """Return the weight and the state of each shard of which several processes have a replica, by name and process."""
    held = {}
    for name, parameter in model.named_parameters():
        place: list[int] = []
        if hasattr(parameter, "placements"):
            coordinate = parameter.device_mesh.get_coordinate()
            place = [c for c, p in zip(coordinate, parameter.placements, strict=True) if not p.is_replicate()]
        tensors = [parameter, *optimizer.state[parameter].values()]
        held[f"{name} {place}"] = [local_tensor(tensor).detach() for tensor in tensors]
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, held)
    found = defaultdict(list)
    for of_rank in gathered:
        for shard, tensors in of_rank.items():
            found[shard].append(tensors)
    return {shard: each for shard, each in found.items() if len(each) > 1}


def train_in_ranks(rank: int, folder: Path) -> None:
    """Train every case on every mesh of this number of processes; rank 0 saves the parameters."""
    torch.set_num_threads(1)
    meshes = json.loads((folder / "meshes.json").read_text())
    size = MeshShape(*meshes[0]).world_size
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=size)
    for mesh in meshes:
        for case in cases_on(mesh):
            shape, keys = CASES[case]
            found = whole_parameters(train(rank, MeshShape(*mesh), shape, muon(keys))[0])
            if rank == 0:
                torch.save(found, folder / f"{case} {mesh}.pt")
        for optimizer in (AdamW(state_dtype="bf16"), Muon(state_dtype="bf16", variant="normuon")):
            torch.manual_seed(rank)  # a run has another random state on every process
            shards = replicas(*train(rank, MeshShape(*mesh), DENSE, optimizer))
            if rank == 0:
                torch.save(shards, folder / f"{type(optimizer).__name__} {mesh} replicas.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("muon")
    for count, meshes in MESHES.items():
        part = folder / str(count)
        part.mkdir()
        (part / "meshes.json").write_text(json.dumps(meshes))
        call_in_ranks(train_in_ranks, part, count)
    return folder


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, torch.Tensor]]:
    """Case -> name -> the parameter after all steps: matrices by the reference, the others by one process."""
    found = {}
    for case, (shape, keys) in CASES.items():
        model = Llama(**shape).build(vocab_size=16, sequence_length=8)
        model.init_weights(0)
        parameters = whole_parameters(train(0, MeshShape(1, 1, 1, 1), shape, muon(keys))[0])
        for name, start in model.named_parameters():
            if name.startswith("layers") and start.ndim > 1 and "router" not in name:
                heads = shape["heads"] if keys.get("per_head") and name.endswith(("wq.weight", "wk.weight")) else 1
                merged = 2 if "w_gate_up" in name else heads
                reference = MuonReference(start.detach(), merged=merged, normuon="variant" in keys)
                for step in range(STEPS):
                    scale = keys.get("lr_scale", "match_rms_adamw")
                    reference.step(gradient(name, start.shape, step), LR, DECAY, lr_scale=scale)
                torch.testing.assert_close(parameters[name].double(), reference.weight, rtol=0, atol=EQUAL)
                parameters[name] = reference.weight
        found[case] = parameters
    return found


@pytest.mark.parametrize(
    ("mesh", "case"), [(mesh, case) for meshes in MESHES.values() for mesh in meshes for case in cases_on(mesh)]
)
def test_updates_equal_the_float64_reference(trained, expected, mesh, case):
    count = MeshShape(*mesh).world_size
    found = torch.load(trained / str(count) / f"{case} {list(mesh)}.pt")
    for name, wanted in expected[case].items():
        tolerance = EQUAL * float(wanted.abs().max())
        torch.testing.assert_close(found[name].double(), wanted.double(), rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("optimizer", ["AdamW", "Muon"])
@pytest.mark.parametrize("mesh", [mesh for meshes in MESHES.values() for mesh in meshes if max(mesh[0], mesh[3]) > 1])
def test_replicas_of_a_shard_stay_equal_with_a_momentum_in_bf16(trained, mesh, optimizer):
    count = MeshShape(*mesh).world_size
    shards = torch.load(trained / str(count) / f"{optimizer} {list(mesh)} replicas.pt")
    assert shards
    for shard, (first, *others) in shards.items():
        for other in others:
            assert all(map(torch.equal, first, other)), shard
