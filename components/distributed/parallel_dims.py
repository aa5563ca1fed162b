"""[parallel]: the device mesh of a run, dp_replicate x dp_shard x cp x tp."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from components.distributed.context import DistributedContext
from components.errors import InputError
from components.units import PositiveCount


class MeshShape(NamedTuple):
    """Number of processes along each dimension of the mesh; the product is the world size."""

    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int

    @property
    def dp_size(self) -> int:
        """Number of data-parallel ranks, which train on different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def fsdp_size(self) -> int:
        """Number of ranks over which the parameters of a replica are sharded."""
        return self.dp_shard * self.cp

    @property
    def world_size(self) -> int:
        return self.dp_size * self.cp * self.tp

    def __str__(self) -> str:
        """Return "2 (dp_replicate) x 4 (dp_shard) x 1 (tp)"; cp is left out without context parallelism."""
        sizes = {name: size for name, size in self._asdict().items() if name != "cp" or size > 1}
        return " x ".join(f"{size} ({name})" for name, size in sizes.items())


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """[parallel]: the product of the four sizes is the number of processes. They affect only speed and memory.

    By default the model is sharded over the processes of a node, and every node holds a replica, so that weights are
    gathered only over the fast links within a node.
    """

    dp_replicate: Annotated[int, Field(ge=-1, lt=2**31)] = -1
    """Data-parallel replicas, each of which holds the whole model in shards; -1: processes / (dp_shard x cp x tp)."""
    dp_shard: Annotated[int, Field(ge=-1, lt=2**31)] = -1
    """Data-parallel ranks over which a replica's parameters, gradients and optimizer state are sharded, together with
    cp; -1: processes / (dp_replicate x cp x tp), or the processes of one node / (cp x tp) if dp_replicate is -1 too."""
    cp: PositiveCount = 1
    """Context-parallel ranks, each with a part of every sequence; 2 cp must divide training.sequence_length."""
    tp: PositiveCount = 1
    """Tensor-parallel ranks, each of which holds a shard of every matrix."""

    def __post_init__(self) -> None:
        for name in ("dp_replicate", "dp_shard"):
            if getattr(self, name) == 0:
                raise InputError(name, "0: must be 1 or more, or -1 to derive it from the other sizes")

    @property
    def sequence_multiple(self) -> int:
        """The number of tokens by which the length of a sequence must be divisible: two chunks for each cp rank, whose
        tokens are divided among the tp ranks."""
        return self.tp if self.cp == 1 else self.cp * math.lcm(2, self.tp)

    def length_problem(self, length: int) -> str | None:
        """Return why sequences of `length` tokens cannot be divided; None if they can."""
        if length % self.sequence_multiple == 0:
            return None
        if self.cp == 1:
            return f"{length} is not divisible by parallel.tp = {self.tp}"
        tp = f", whose tokens are divided among parallel.tp = {self.tp} ranks" if self.tp > 1 else ""
        why = f"each of parallel.cp = {self.cp} ranks computes two equal chunks{tp}"
        return f"{length} is not divisible by {self.sequence_multiple}: {why}"

    def mesh_shape(self, world_size: int, local_size: int | None = None) -> MeshShape:
        """Return the mesh of `world_size` processes, `local_size` on each node (default: all on one node).

        Raises InputError if the sizes do not multiply to `world_size`.
        """
        replicas, shards, ranks = self.dp_replicate, self.dp_shard, self.cp * self.tp
        if world_size % ranks:
            key = "tp" if self.tp > 1 else "cp"
            raise InputError(key, f"cp x tp = {ranks} does not divide the {world_size} processes of this run")
        if replicas == shards == -1:
            node = local_size or world_size
            # the ranks of one sample are neighbors; if a node does not hold whole groups, shard over all processes
            shards = node // ranks if world_size % node == 0 and node % ranks == 0 else world_size // ranks
        if shards < 1:
            shards = max(1, world_size // (replicas * ranks))
        if replicas == -1:
            replicas = max(1, world_size // (shards * ranks))
        mesh_shape = MeshShape(replicas, shards, self.cp, self.tp)
        if mesh_shape.world_size != world_size:
            raise InputError(
                "dp_shard",
                f"{mesh_shape} is not the {world_size} processes of this run; "
                "use -1 to derive one size from the others",
            )
        return mesh_shape

    def build(self, world: DistributedContext) -> ParallelDims:
        # All processes must derive the same mesh, also if nodes have different numbers of processes.
        uniform = world.all_equal(str(world.local_size))
        return ParallelDims(world, self.mesh_shape(world.size, world.local_size if uniform else None))


class ParallelDims:
    """The device mesh of a run: TP ranks are neighbors, and next to them the CP ranks. One process has no mesh."""

    def __init__(self, world: DistributedContext, mesh_shape: MeshShape) -> None:
        self.mesh_shape = mesh_shape
        self.mesh: DeviceMesh | None = None
        """(dp_replicate, fsdp, tp): FSDP2 shards over dp_shard and cp together, as one dimension."""
        self.sequence_mesh: DeviceMesh | None = None
        """(dp, cp, tp): the ranks that have the same samples, with context parallelism."""
        group = None
        if world.size > 1:
            replicas, tp, device = mesh_shape.dp_replicate, mesh_shape.tp, world.device.type
            sizes = (replicas, mesh_shape.fsdp_size, tp)
            self.mesh = init_device_mesh(device, sizes, mesh_dim_names=("dp_replicate", "fsdp", "tp"))
            if mesh_shape.cp == 1:
                group = self.mesh["dp_replicate", "fsdp"]._flatten("dp").get_group()
            else:
                sizes = (mesh_shape.dp_size, mesh_shape.cp, tp)
                self.sequence_mesh = init_device_mesh(device, sizes, mesh_dim_names=("dp", "cp", "tp"))
                group = self.sequence_mesh.get_group("dp")
        ranks = mesh_shape.cp * mesh_shape.tp
        self.dp = DataParallelGroup(world.rank // ranks, world.size // ranks, world.device, group)

    @property
    def tp(self) -> DeviceMesh | None:
        """The mesh of this process's TP ranks; None without tensor parallelism."""
        return self.mesh["tp"] if self.mesh is not None and self.mesh_shape.tp > 1 else None

    @property
    def cp(self) -> DeviceMesh | None:
        """The mesh of this process's CP ranks; None without context parallelism."""
        return None if self.sequence_mesh is None else self.sequence_mesh["cp"]

    @property
    def summands(self) -> DeviceMesh | None:
        """The mesh of the ranks with summands of a gradient, (cp,) or (cp, tp); None without context parallelism."""
        if self.sequence_mesh is None:
            return None
        return self.sequence_mesh["cp"] if self.mesh_shape.tp == 1 else self.sequence_mesh["cp", "tp"]

    @property
    def fsdp(self) -> DeviceMesh | None:
        """The mesh over which FSDP2 shards: (fsdp,) or (dp_replicate, fsdp); None for a single process."""
        if self.mesh is None:
            return None
        return self.mesh["fsdp"] if self.mesh_shape.dp_replicate == 1 else self.mesh["dp_replicate", "fsdp"]


@dataclass(frozen=True)
class DataParallelGroup:
    """This process among the data-parallel ranks. The CP and TP ranks of one data-parallel rank share its number."""

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None = None

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over the data-parallel ranks, in place, and return it."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor
