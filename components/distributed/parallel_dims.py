"""[parallel]: how the processes of a run divide the work, as one mesh of replicas x shards x tensor-parallel ranks."""

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
    """Processes along each dimension of the mesh; their product is the world size."""

    dp_replicate: int
    dp_shard: int
    tp: int

    @property
    def dp_size(self) -> int:
        """Data-parallel ranks: processes that see different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def world_size(self) -> int:
        return self.dp_size * self.tp


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """[parallel]: the product of the three is the number of processes. Only speed and memory depend on them.

    By default the model is sharded among the processes of a node, and every node holds a replica: weights are gathered
    over the fast links within a node only.
    """

    dp_replicate: Annotated[int, Field(ge=-1, lt=2**31)] = -1
    """Data-parallel replicas: each holds the whole model, in shards; -1: what dp_shard and tp leave."""
    dp_shard: Annotated[int, Field(ge=-1, lt=2**31)] = -1
    """Data-parallel ranks that share one replica's parameters, gradients and optimizer state; -1: what dp_replicate and
    tp leave, or the processes of one node if dp_replicate is -1, too."""
    tp: PositiveCount = 1
    """Tensor-parallel ranks: each holds a slice of every matrix."""

    def __post_init__(self) -> None:
        for name in ("dp_replicate", "dp_shard"):
            if getattr(self, name) == 0:
                raise InputError(name, "1 or more, or -1 for what the others leave")

    def sizes(self, world_size: int, local_size: int | None = None) -> MeshShape:
        """The mesh of a run of `world_size` processes, `local_size` on each node; without it they are all on one.

        Raises ValueError, with the arithmetic.
        """
        replicas, shards, tp = self.dp_replicate, self.dp_shard, self.tp
        if replicas == shards == -1:
            node = local_size or world_size
            # tensor-parallel ranks are neighbours: where nodes do not hold whole groups of them, shard over all
            shards = node // tp if world_size % node == 0 and node % tp == 0 else world_size // tp
        if shards < 1:
            shards = max(1, world_size // (replicas * tp))
        if replicas == -1:
            replicas = max(1, world_size // (shards * tp))
        if replicas * shards * tp != world_size:
            raise InputError(
                "dp_shard",
                f"{replicas} (dp_replicate) x {shards} (dp_shard) x {tp} (tp) "
                f"is not the {world_size} processes of this run; -1 takes what the others leave",
            )
        return MeshShape(replicas, shards, tp)

    def build(self, world: DistributedContext) -> ParallelDims:
        # all processes must come to the same mesh, also where a node has fewer of them than another
        uniform = world.maximum(world.local_size) == -world.maximum(-world.local_size)
        return ParallelDims(world, self.sizes(world.size, world.local_size if uniform else None))


class ParallelDims:
    """The mesh of a run, and this process in it. Tensor-parallel ranks are neighbours; one process alone has none."""

    def __init__(self, world: DistributedContext, sizes: MeshShape) -> None:
        self.sizes = sizes
        self.mesh: DeviceMesh | None = None
        group = None
        if world.size > 1:
            self.mesh = init_device_mesh(world.device.type, sizes, mesh_dim_names=MeshShape._fields)
            group = self.mesh["dp_replicate", "dp_shard"]._flatten("dp").get_group()
        self.data = DataParallelGroup(world.rank // sizes.tp, world.size // sizes.tp, world.device, group)

    @property
    def tp(self) -> DeviceMesh | None:
        """The tensor-parallel ranks this process works with, if any."""
        return self.mesh["tp"] if self.mesh is not None and self.sizes.tp > 1 else None

    @property
    def fsdp(self) -> DeviceMesh | None:
        """The ranks that hold other shards of the same slices: (shards) or (replicas, shards)."""
        if self.mesh is None:
            return None
        return self.mesh["dp_shard"] if self.sizes.dp_replicate == 1 else self.mesh["dp_replicate", "dp_shard"]


@dataclass(frozen=True)
class DataParallelGroup:
    """This process among those that see different samples. Tensor-parallel neighbours share one rank here."""

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None = None

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor` added over the data-parallel ranks, in place; equal on all processes if neighbours agreed."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor
