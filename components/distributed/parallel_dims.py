"""[parallel]: the device mesh of a run, dp_replicate x dp_shard x tp."""

from __future__ import annotations

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
    tp: int

    @property
    def dp_size(self) -> int:
        """Number of data-parallel ranks, which train on different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def world_size(self) -> int:
        return self.dp_size * self.tp


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """[parallel]: the product of the three sizes is the number of processes. They affect only speed and memory.

    By default the model is sharded over the processes of a node, and every node holds a replica, so that weights are
    gathered only over the fast links within a node.
    """

    dp_replicate: Annotated[int, Field(ge=-1, lt=2**31)] = -1
    """Data-parallel replicas, each of which holds the whole model in shards; -1: processes / (dp_shard x tp)."""
    dp_shard: Annotated[int, Field(ge=-1, lt=2**31)] = -1
    """Data-parallel ranks over which a replica's parameters, gradients and optimizer state are sharded; -1: processes /
    (dp_replicate x tp), or the processes of one node / tp if dp_replicate is -1 too."""
    tp: PositiveCount = 1
    """Tensor-parallel ranks, each of which holds a shard of every matrix."""

    def __post_init__(self) -> None:
        for name in ("dp_replicate", "dp_shard"):
            if getattr(self, name) == 0:
                raise InputError(name, "0: must be 1 or more, or -1 to derive it from the other sizes")

    def mesh_shape(self, world_size: int, local_size: int | None = None) -> MeshShape:
        """Return the mesh of `world_size` processes, `local_size` on each node (default: all on one node).

        Raises InputError if the sizes do not multiply to `world_size`.
        """
        replicas, shards, tp = self.dp_replicate, self.dp_shard, self.tp
        if replicas == shards == -1:
            node = local_size or world_size
            # TP ranks are neighbors; if a node does not hold a whole number of TP groups, shard over all processes
            shards = node // tp if world_size % node == 0 and node % tp == 0 else world_size // tp
        if shards < 1:
            shards = max(1, world_size // (replicas * tp))
        if replicas == -1:
            replicas = max(1, world_size // (shards * tp))
        if replicas * shards * tp != world_size:
            raise InputError(
                "dp_shard",
                f"{replicas} (dp_replicate) x {shards} (dp_shard) x {tp} (tp) "
                f"is not the {world_size} processes of this run; use -1 to derive one size from the others",
            )
        return MeshShape(replicas, shards, tp)

    def build(self, world: DistributedContext) -> ParallelDims:
        # All processes must derive the same mesh, also if nodes have different numbers of processes.
        uniform = world.all_reduce_max(world.local_size) == -world.all_reduce_max(-world.local_size)
        return ParallelDims(world, self.mesh_shape(world.size, world.local_size if uniform else None))


class ParallelDims:
    """The device mesh of a run, and this process's place in it. TP ranks are neighbors; one process has no mesh."""

    def __init__(self, world: DistributedContext, mesh_shape: MeshShape) -> None:
        self.mesh_shape = mesh_shape
        self.mesh: DeviceMesh | None = None
        group = None
        if world.size > 1:
            self.mesh = init_device_mesh(world.device.type, mesh_shape, mesh_dim_names=MeshShape._fields)
            group = self.mesh["dp_replicate", "dp_shard"]._flatten("dp").get_group()
        self.dp = DataParallelGroup(world.rank // mesh_shape.tp, world.size // mesh_shape.tp, world.device, group)

    @property
    def tp(self) -> DeviceMesh | None:
        """The mesh of this process's TP ranks; None without tensor parallelism."""
        return self.mesh["tp"] if self.mesh is not None and self.mesh_shape.tp > 1 else None

    @property
    def fsdp(self) -> DeviceMesh | None:
        """The mesh over which FSDP2 shards: (dp_shard,) or (dp_replicate, dp_shard); None for a single process."""
        if self.mesh is None:
            return None
        return self.mesh["dp_shard"] if self.mesh_shape.dp_replicate == 1 else self.mesh["dp_replicate", "dp_shard"]


@dataclass(frozen=True)
class DataParallelGroup:
    """This process among the data-parallel ranks. The TP ranks of one data-parallel rank share its number."""

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None = None

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over the data-parallel ranks, in place, and return it."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor
