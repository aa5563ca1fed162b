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
from torch import nn
from torch.distributed.tensor import distribute_tensor

from components.distributed.fsdp import GradSync
from components.distributed.parallel_dims import MeshShape, ParallelDims
from components.local_tensor import local_tensor
from components.optimizers import AdamW, Muon
from models.llama import Llama
from recipes.parallelize import materialize, parallelize
from tests.components.optimizers.muon_reference import MuonReference
from tests.processes import call_in_ranks

pytestmark = [pytest.mark.filterwarnings("ignore:torch.distributed is disabled"), pytest.mark.timeout(600)]

STEPS, LR, DECAY = 3, 0.02, 0.1
EQUAL = 1e-5
"""Relative to the largest element: three float32 iterations of five steps differ from float64 by 2e-6 here."""
BF16 = 5e-2
"""The same for an iteration and an exchange in bf16, which differ by 2.5e-2 here; updates are as large as weights."""
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
    "dense": (DENSE, {"coefficients": "quintic"}),
    "dense, bf16": (DENSE, {"compute_dtype": "bf16"}),
    "dense, normuon": (DENSE, {"variant": "normuon"}),
    "experts": (EXPERTS, {}),
    "experts, normuon": (EXPERTS, {"variant": "normuon", "coefficients": "quintic"}),
    "per head": (DENSE, {"per_head": True, "lr_scale": "spectral"}),
    "uneven shards": (UNEVEN, {}),
    "uneven shards of experts, normuon": (UNEVEN_EXPERTS, {"variant": "normuon"}),
}
MODES = {"gradients reduced every time": False, "gradients reduced once": True}
"""How real gradients are accumulated -> `once_per_step`; all other cases set gradients."""
ACCUMULATING = [(2, 1, 1, 1), (1, 2, 1, 1), (2, 2, 1, 1), (1, 2, 1, 2)]
"""The meshes on which they are: replicas, shards, both, and shards of TP ranks."""


def cases_on(mesh: Sequence[int]) -> list[str]:
    """Return the cases that are compared on `mesh`: uneven shards where 4 ranks shard, since TP needs equal ones."""
    return [case for case in CASES if "uneven" not in case or tuple(mesh) == (1, 4, 1, 1)]


def modes_on(mesh: Sequence[int]) -> list[str]:
    return list(MODES) if tuple(mesh) in ACCUMULATING else []


def muon(keys: dict) -> Muon:
    return Muon(weight_decay=DECAY, **keys)


def gradient(name: str, shape: torch.Size, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + sum(map(ord, name)))
    return torch.randn(shape, generator=generator)


def set_gradients(model: nn.Module, step: int) -> None:
    for name, parameter in model.named_parameters():
        whole = gradient(name, parameter.shape, step)
        placed = hasattr(parameter, "placements")
        parameter.grad = (
            distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
            if placed
            else whole
        )


def accumulate(model: nn.Module, sync: GradSync, step: int, dp_rank: int, dp_size: int) -> None:
    """Compute the gradients of two micro-batches of four samples, which are divided among the data-parallel ranks."""
    model.zero_grad()
    tokens = torch.randint(16, (2, 4, 9), generator=torch.Generator().manual_seed(step))
    for number, micro_batch in enumerate(tokens, 1):
        own = micro_batch.chunk(dp_size)[dp_rank]
        loss = model(own[:, :-1], own[:, 1:])
        sync.prepare_backward(last=number == len(tokens))
        (loss / tokens[..., 1:].numel()).backward()


def train(
    rank: int, mesh_shape: MeshShape, shape: dict, optimizer: AdamW, *, once_per_step: bool | None = None
) -> tuple[nn.Module, torch.optim.Optimizer]:
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
    sync = GradSync(model, once_per_step=bool(once_per_step))
    for step in range(STEPS):
        if once_per_step is None:
            set_gradients(model, step)
        else:
            accumulate(model, sync, step, mesh.dp.rank, mesh.dp.size)
        take_step(built)
    return model, built


def take_step(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] = LR * group["lr_multiplier"]
    optimizer.step()


def whole_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach()
        for name, parameter in model.named_parameters()
    }


def replicas(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, list[list[torch.Tensor]]]:
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
        for mode in modes_on(mesh):
            trained = train(rank, MeshShape(*mesh), DENSE, muon({}), once_per_step=MODES[mode])
            found = whole_parameters(trained[0])
            if rank == 0:
                torch.save(found, folder / f"{mode} {mesh}.pt")
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


def references(model: nn.Module, shape: dict, keys: dict) -> dict[str, MuonReference]:
    """Return the float64 reference of each matrix that Muon updates."""
    found = {}
    for name, start in model.named_parameters():
        if name.startswith("layers") and start.ndim > 1 and "router" not in name:
            heads = shape["heads"] if keys.get("per_head") and name.endswith(("wq.weight", "wk.weight")) else 1
            merged = 2 if "w_gate_up" in name else heads
            coefficients = keys.get("coefficients", "polar_express")
            found[name] = MuonReference(
                start.detach(), merged=merged, normuon="variant" in keys, coefficients=coefficients
            )
    return found


def expected_of_gradients(shape: dict, keys: dict) -> dict[str, torch.Tensor]:
    """Return the parameters after all steps: matrices by the reference, the others by one process."""
    model = Llama(**shape).build(vocab_size=16, sequence_length=8)
    model.init_weights(0)
    parameters = whole_parameters(train(0, MeshShape(1, 1, 1, 1), shape, muon(keys))[0])
    scale = keys.get("lr_scale", "match_rms_adamw")
    for name, reference in references(model, shape, keys).items():
        for step in range(STEPS):
            reference.step(gradient(name, reference.weight.shape, step), LR, DECAY, lr_scale=scale)
        parameters[name] = reference.weight
    return parameters


def expected_of_accumulation() -> dict[str, torch.Tensor]:
    """Return the same for the gradients of one process in float64."""
    model = Llama(**DENSE).build(vocab_size=16, sequence_length=8)
    model.init_weights(0)
    model.double()
    optimizer, matrices = muon({}).build(model=model), references(model, DENSE, {})
    for step in range(STEPS):
        accumulate(model, GradSync(model, once_per_step=False), step, 0, 1)
        for name, reference in matrices.items():
            reference.step(model.get_parameter(name).grad, LR, DECAY)
        take_step(optimizer)
        for name, reference in matrices.items():
            model.get_parameter(name).data.copy_(reference.weight)
    return whole_parameters(model)


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, torch.Tensor]]:
    """Case -> name -> the parameter after all steps."""
    found = {case: expected_of_gradients(shape, keys) for case, (shape, keys) in CASES.items()}
    return found | dict.fromkeys(MODES, expected_of_accumulation())


@pytest.mark.parametrize(
    ("mesh", "case"),
    [(mesh, case) for meshes in MESHES.values() for mesh in meshes for case in [*cases_on(mesh), *modes_on(mesh)]],
)
def test_updates_equal_the_float64_reference(trained, expected, mesh, case):
    count = MeshShape(*mesh).world_size
    found = torch.load(trained / str(count) / f"{case} {list(mesh)}.pt")
    for name, wanted in expected[case].items():
        tolerance = (BF16 if "bf16" in case else EQUAL) * float(wanted.abs().max())
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
