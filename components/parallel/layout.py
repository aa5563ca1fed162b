"""[parallel]: how the processes of a run divide the work, as one mesh of replicas x shards x tensor-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from components.parallel.world import World
from components.quantities import PositiveCount


class Sizes(NamedTuple):
    """Processes along each dimension of the mesh; their product is the world size."""

    dp_replicate: int
    dp_shard: int
    tp: int


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """[parallel]: the product of the three is the number of processes. Only speed and memory depend on them."""

    dp_replicate: PositiveCount = 1
    """Data-parallel replicas: each holds the whole model, in shards."""
    dp_shard: Annotated[int, Field(ge=-1, lt=2**31)] = -1
    """Data-parallel ranks that share one replica's parameters, gradients and optimizer state; -1: the rest."""
    tp: PositiveCount = 1
    """Tensor-parallel ranks: each holds a slice of every matrix."""

    def __post_init__(self) -> None:
        if self.dp_shard == 0:
            raise ValueError("dp_shard: 1 or more, or -1 for the rest")

    def sizes(self, world_size: int) -> Sizes:
        """The mesh of a run of `world_size` processes. Raises ValueError, with the arithmetic."""
        shards = self.dp_shard
        if shards == -1:
            shards = world_size // (self.dp_replicate * self.tp)
        if self.dp_replicate * shards * self.tp != world_size or shards < 1:
            raise ValueError(
                f"dp_shard: {self.dp_replicate} (dp_replicate) x {self.dp_shard} (dp_shard) x {self.tp} (tp) "
                f"is not the {world_size} processes of this run; dp_shard = -1 takes what the others leave"
            )
        return Sizes(self.dp_replicate, shards, self.tp)

    def build(self, world: World) -> Layout:
        return Layout(world, self.sizes(world.size))


class Layout:
    """The mesh of a run, and this process in it. Tensor-parallel ranks are neighbours; one process alone has none."""

    def __init__(self, world: World, sizes: Sizes) -> None:
        self.sizes = sizes
        self.mesh: DeviceMesh | None = None
        group = None
        if world.size > 1:
            self.mesh = init_device_mesh(world.device.type, sizes, mesh_dim_names=Sizes._fields)
            group = self.mesh["dp_replicate", "dp_shard"]._flatten("dp").get_group()
        self.data = DataRanks(world.rank // sizes.tp, world.size // sizes.tp, world.device, group)

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
class DataRanks:
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
