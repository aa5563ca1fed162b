"""Data parallelism: FSDP2 over a mesh of replicas x shards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from components.quantities import PositiveCount


class Sizes(NamedTuple):
    """Ranks along each way of dividing the work; their product is the number of processes."""

    dp_replicate: int
    dp_shard: int
    tp: int


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """[parallel]: how the processes of a run divide the work; their product is the number of processes."""

    dp_replicate: PositiveCount = 1
    """Data-parallel replicas: each holds the whole model, in shards."""
    dp_shard: Annotated[int, Field(ge=-1)] = -1
    """Data-parallel ranks that share one replica's parameters, gradients and optimizer state; -1: the rest."""
    tp: PositiveCount = 1
    """Tensor-parallel ranks: each holds a slice of every matrix."""

    def __post_init__(self) -> None:
        if self.dp_shard == 0:
            raise ValueError("dp_shard: 1 or more, or -1 for the rest")

    def sizes(self, world_size: int) -> Sizes:
        """The ranks along each axis, for a run of `world_size` processes. Raises ValueError, with the arithmetic."""
        shards = self.dp_shard
        if shards == -1:
            shards = world_size // (self.dp_replicate * self.tp)
        if self.dp_replicate * shards * self.tp != world_size or shards < 1:
            by_tp = f" x {self.tp} (tp)" if self.tp > 1 else ""
            raise ValueError(
                f"dp_shard: {self.dp_replicate} (dp_replicate) x {self.dp_shard} (dp_shard){by_tp} "
                f"is not the {world_size} processes of this run; dp_shard = -1 takes what the others leave"
            )
        return Sizes(self.dp_replicate, shards, self.tp)

    def shard(
        self,
        model: nn.Module,
        blocks: list[nn.Module],
        *,
        world_size: int,
        device_type: str,
        compute_dtype: torch.dtype,
    ) -> None:
        """Shard `model` in place, one FSDP unit per block and one for the rest. One process: nothing to do."""
        if world_size == 1:
            return
        replicas, shards, _ = self.sizes(world_size)
        mesh = init_device_mesh(device_type, (replicas, shards), mesh_dim_names=("dp_replicate", "dp_shard"))
        precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=precision)
        fully_shard(model, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
