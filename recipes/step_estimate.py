"""What one optimizer step costs: computing, exchanging, launching kernels. The largest of the three bounds the step.

All three are lower bounds that overlap at best. Bytes are exact for FSDP2; the rest rests on the constants below.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from components.throughput import Device
from recipes.contracts import HasPlan
from recipes.memory_estimate import Memory, blocks_of, share
from recipes.plan import Plan

MATMUL_UTILISATION = 0.65
"""Of the peak that large bf16 products and attention reach: 650 of the 989 TFLOP/s of an H100."""
OTHER_KERNELS = {"dense": 0.27, "experts": 0.75}
"""Time of all other kernels, as a share of that of the products: from their bytes at 3.0 TB/s on an H100."""
NVLINK_UTILISATION = 0.73
"""Of one direction of the links of a node: 330 of the 450 GB/s of an H100."""
INFINIBAND = 45e9
"""Bytes a second of each GPU's own adapter of 400 Gbit/s: 46 to 48 GB/s are the most (NVIDIA/nccl-tests issue 290)."""
LAUNCH = {
    "dense": {"none": 1.5e-3, "full": 3.7e-3, "selective": 8.7e-3, "compiled": 0.85e-3},
    "experts": {"none": 4.0e-3, "full": 9.8e-3, "selective": 18e-3, "compiled": 2.1e-3},
    "tp": {"eager": 34e-3, "compiled": 12e-3},
    "fsdp": {"reduce": 6.8e-3, "local": 2.5e-3},
}
"""Processor seconds to launch forward and backward of a block, measured on a small two-core machine. Of "tp" all of
them, with FSDP2; those of "fsdp" come on top of a block's own."""
HOST_SPEEDUP = 1.5
"""How much faster the processor of a GPU server is than that machine: a guess, at the careful end of 1.5 to 2."""


@dataclass(frozen=True)
class Exchange:
    """Collectives of one kind in a step, over `ranks` processes that are `stride` apart."""

    size: float
    """Bytes of the larger side of all of them: what is gathered, scattered or reduced."""
    ranks: int
    stride: int
    rounds: int = 1
    """2 for an all-reduce, which is a reduce-scatter and an all-gather."""

    def seconds(self, local_size: int, link_bytes: float) -> tuple[float, float]:
        """Over NVLink, of `link_bytes` a second, and over InfiniBand, with `local_size` processes on each node.

        A rank sends and receives (n - 1) / n of the bytes for every round (NVIDIA/nccl-tests, doc/PERFORMANCE.md).
        Between nodes only what is not there yet must enter, through the adapters of all members on the node.
        """
        here = max(1, min(self.ranks, local_size // self.stride))
        size = self.rounds * self.size
        inside = size * (self.ranks - 1) / self.ranks if here > 1 else 0.0
        entering = size * (1 - here / self.ranks) / here
        return inside / (link_bytes * NVLINK_UTILISATION), entering / INFINIBAND


@dataclass(frozen=True)
class StepEstimate:
    """Seconds of one step on one rank."""

    compute: float
    nvlink: float
    infiniband: float
    launch: float

    @property
    def bound(self) -> str:
        """What takes longest."""
        names = {"compute": "compute", "nvlink": "NVLink", "infiniband": "InfiniBand", "launch": "launching"}
        return names[max(names, key=lambda name: getattr(self, name))]


def estimate_step(plan: Plan, device: Device, micro_batches: int) -> StepEstimate | None:
    """A step of `micro_batches` on `device`, a GPU; None for a CPU, which launches nothing and shares its memory.

    Without an estimate of memory the exchanges of tensor parallelism are left out.
    """
    if device.link_bytes is None:
        return None
    training, memory = plan.recipe.training, plan.memory
    tokens = micro_batches * training.micro_batch_size * training.sequence_length
    again = recomputed_share(training.activation_checkpoint)
    products = tokens * plan.flops_per_token / plan.sizes.tp
    if training.activation_checkpoint != "selective":  # which keeps the results of products
        products *= 1 + again / 3
    compute = products / (device.flops * MATMUL_UTILISATION) * (1 + OTHER_KERNELS[_kind(plan.model)])
    local = isinstance(memory, Memory) and plan.accumulates_locally(memory, device)
    found = [
        exchange.seconds(plan.local_size, device.link_bytes)
        for exchange in (
            *fsdp_exchanges(plan, micro_batches, local=local),
            *tensor_parallel_exchanges(plan, micro_batches, again),
        )
        if exchange.ranks > 1
    ]
    nvlink, infiniband = (sum(seconds) for seconds in zip(*found, strict=True)) if found else (0.0, 0.0)
    return StepEstimate(compute, nvlink, infiniband, micro_batches * launch_seconds(plan, local=local))


def fsdp_exchanges(plan: Plan, micro_batches: int, *, local: bool) -> Iterator[Exchange]:
    """Gathers of weights, reduce-scatters over the shards and all-reduces over the replicas of one step."""
    sizes, model, element = plan.sizes, plan.model, plan.dtype.itemsize
    units = plan.recipe.model.plan(tp=sizes.tp).units if isinstance(plan.recipe.model, HasPlan) else []
    forward = sum(share(parameter, sizes) for parameter in model.parameters())
    backward = sum(share(parameter, sizes) for parameter in gathered_again(model, units))
    passes = 1 if local else micro_batches
    gathered = forward if local else micro_batches * (forward + backward)
    shards = sizes.dp_shard
    yield Exchange(shards * element * gathered, shards, sizes.tp)
    yield Exchange(shards * 4 * forward * passes, shards, sizes.tp)
    yield Exchange(4 * forward, sizes.dp_replicate, shards * sizes.tp, rounds=2)


def gathered_again(model: nn.Module, units: Sequence[Sequence[str]]) -> Iterator[nn.Parameter]:
    """Parameters that FSDP2 gathers for backward, too: all in units but the last unit's, and those of embeddings."""
    for names in units[:-1]:
        modules = [model.get_submodule(name) for name in names]
        if not all(isinstance(module, nn.Embedding) for module in modules):
            for module in modules:
                yield from module.parameters()


def tensor_parallel_exchanges(plan: Plan, micro_batches: int, again: float) -> Iterator[Exchange]:
    """Gathers and reduce-scatters of activations: two of each forward and backward, and when a block is recomputed."""
    memory, blocks = plan.memory, len(blocks_of(plan.model))
    if isinstance(memory, str) or not blocks:
        return
    # one of each around the embedding and one around the head, forward and backward together
    times = 8 + 4 * again + 4 / blocks
    yield Exchange(micro_batches * times * memory.block_inputs, plan.sizes.tp, 1)


def launch_seconds(plan: Plan, *, local: bool) -> float:
    """Processor seconds of launching one micro-batch on a GPU server."""
    training, blocks = plan.recipe.training, len(blocks_of(plan.model))
    compiled = training.compiles(torch.device("cuda"))
    if plan.sizes.tp > 1:
        return blocks * LAUNCH["tp"]["compiled" if compiled else "eager"] / HOST_SPEEDUP
    costs = LAUNCH[_kind(plan.model)]
    mode = training.activation_checkpoint
    if compiled:
        block = costs["compiled"]
    elif isinstance(mode, int):
        block = costs["none"] + (costs["full"] - costs["none"]) / mode
    else:
        block = costs[mode]
    if plan.world_size > 1:
        block += LAUNCH["fsdp"]["local" if local else "reduce"]
    return blocks * block / HOST_SPEEDUP


def recomputed_share(mode: str | int) -> float:
    """Of the blocks that run forward again in backward."""
    return 1 / mode if isinstance(mode, int) else float(mode != "none")


def _kind(model: nn.Module) -> str:
    return "experts" if any(parameter.ndim == 3 for parameter in model.parameters()) else "dense"
