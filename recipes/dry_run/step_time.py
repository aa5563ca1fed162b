"""Estimate the time of one optimizer step: compute, communication and kernel launches. The largest one bounds it.

Each is a lower bound, and at best all overlap. Bytes are exact for FSDP2; the rest depends on the constants below.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from components.hardware import DeviceSpec
from recipes.dry_run.memory import Memory, key_value_bytes, local_numel, numel_per_tp_rank
from recipes.dry_run.plan import RunPlan
from recipes.interfaces import HasParallelPlan
from recipes.model_setup import transformer_blocks

MATMUL_UTILIZATION = 0.65
"""The fraction of the peak that large bf16 products and attention reach: 650 of the 989 TFLOP/s of an H100."""
OTHER_KERNELS = {"dense": 0.27, "experts": 0.75}
"""Time of all other kernels, as a fraction of that of the products: from their bytes at 3.0 TB/s on an H100."""
NVLINK_UTILIZATION = 0.73
"""The fraction of one direction of a node's links that is reached: 330 of the 450 GB/s of an H100."""
INFINIBAND = 45e9
"""Bytes per second of the 400 Gbit/s adapter of each GPU: 46 to 48 GB/s at most (NVIDIA/nccl-tests issue 290)."""
LAUNCH_SECONDS = {
    "dense": {"none": 1.5e-3, "full": 3.7e-3, "selective": 8.7e-3, "compiled": 0.85e-3},
    "experts": {"none": 4.0e-3, "full": 9.8e-3, "selective": 18e-3, "compiled": 2.1e-3},
    "tp": {"eager": 34e-3, "compiled": 12e-3},
    "fsdp": {"every_micro_batch": 6.8e-3, "once_per_step": 2.5e-3},
}
"""CPU seconds to launch forward and backward of a block, measured on a small two-core machine. Those of "tp" include
FSDP2; those of "fsdp" are added to a block's own."""
HOST_SPEEDUP = 1.5
"""How much faster the CPU of a GPU server is than that machine: a guess, the lower end of 1.5 to 2."""


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind in a step, over `ranks` processes whose numbers are `stride` apart."""

    size: float
    """Bytes of the larger side, added up: what is gathered, scattered or reduced."""
    ranks: int
    stride: int
    rounds: int = 1
    """2 for an all-reduce, which is a reduce-scatter and an all-gather."""
    distinct: bool = False
    """Whether the ranks of a node receive different data, as in an all-to-all."""

    def seconds(self, local_size: int, link_bytes: float) -> tuple[float, float]:
        """Return the seconds over NVLink (`link_bytes` per second) and InfiniBand, with `local_size` ranks per node.

        A rank sends and receives (n - 1) / n of the bytes in every round (NVIDIA/nccl-tests, doc/PERFORMANCE.md).
        Between nodes only the part that the node does not hold is received, through the adapters of all its ranks.
        """
        here = max(1, min(self.ranks, local_size // self.stride))
        size = self.rounds * self.size
        inside = size * (self.ranks - 1) / self.ranks if here > 1 else 0.0
        entering = size * (1 - here / self.ranks) / (1 if self.distinct else here)
        return inside / (link_bytes * NVLINK_UTILIZATION), entering / INFINIBAND


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on one rank."""

    compute: float
    nvlink: float
    infiniband: float
    launch: float

    @property
    def bound(self) -> str:
        names = {"compute": "compute", "nvlink": "NVLink", "infiniband": "InfiniBand", "launch": "launching"}
        return names[max(names, key=lambda name: getattr(self, name))]


def estimate_step_time(plan: RunPlan, device: DeviceSpec, micro_batches: int) -> StepTime | None:
    """Return the time of a step of `micro_batches` on `device`, or None for a CPU, which has no links or launches.

    Without a memory estimate the collectives of tensor parallelism are left out.
    """
    if device.link_bytes is None:
        return None
    training, memory = plan.recipe.training, plan.memory
    tokens = micro_batches * training.micro_batch_size * training.sequence_length
    recomputed = recomputed_fraction(training.activation_checkpoint)
    products = tokens * plan.flops_per_token / (plan.mesh_shape.cp * plan.mesh_shape.tp)
    if training.activation_checkpoint != "selective":  # which keeps the results of products
        products *= 1 + recomputed / 3
    compute = products / (device.flops * MATMUL_UTILIZATION) * (1 + OTHER_KERNELS[_model_kind(plan.model)])
    if plan.update_cost is not None:
        compute += plan.update_cost.flops / plan.mesh_shape.world_size / (device.flops * MATMUL_UTILIZATION)
    local = isinstance(memory, Memory) and plan.syncs_once_per_step(memory, device)
    seconds = [
        collective.seconds(plan.local_size, device.link_bytes)
        for collective in (
            *fsdp_collectives(plan, micro_batches, local=local),
            *tp_collectives(plan, micro_batches, recomputed),
            *cp_collectives(plan, micro_batches, recomputed),
            *update_collectives(plan),
            *adam_norm_collectives(plan),
        )
        if collective.ranks > 1
    ]
    nvlink, infiniband = (sum(each) for each in zip(*seconds, strict=True)) if seconds else (0.0, 0.0)
    return StepTime(compute, nvlink, infiniband, micro_batches * launch_seconds(plan, local=local))


def fsdp_collectives(plan: RunPlan, micro_batches: int, *, local: bool) -> Iterator[Collective]:
    """Yield the all-gathers and reduce-scatters over the shards, and the all-reduces over the replicas, of one step."""
    mesh_shape, model, element = plan.mesh_shape, plan.model, plan.dtype.itemsize
    groups = (
        plan.recipe.model.plan(tp=mesh_shape.tp).fsdp_groups if isinstance(plan.recipe.model, HasParallelPlan) else []
    )
    forward = sum(local_numel(parameter, mesh_shape) for parameter in model.parameters())
    backward = sum(local_numel(parameter, mesh_shape) for parameter in regathered_parameters(model, groups))
    passes = 1 if local else micro_batches
    gathered = forward if local else micro_batches * (forward + backward)
    shards = mesh_shape.fsdp_size
    yield Collective(shards * element * gathered, shards, mesh_shape.tp)
    yield Collective(shards * 4 * forward * passes, shards, mesh_shape.tp)
    yield Collective(4 * forward, mesh_shape.dp_replicate, shards * mesh_shape.tp, rounds=2)


def regathered_parameters(model: nn.Module, groups: Sequence[Sequence[str]]) -> Iterator[nn.Parameter]:
    """Yield the parameters that FSDP2 gathers again for backward: of all groups but the last and the embeddings."""
    for names in groups[:-1]:
        modules = [model.get_submodule(name) for name in names]
        if not all(isinstance(module, nn.Embedding) for module in modules):
            for module in modules:
                yield from module.parameters()


def tp_collectives(plan: RunPlan, micro_batches: int, recomputed: float) -> Iterator[Collective]:
    """Yield the collectives of activations: two of each kind in forward, backward and recomputation of a block."""
    memory, blocks = plan.memory, len(transformer_blocks(plan.model))
    if isinstance(memory, str) or not blocks:
        return
    # one of each around the embedding and one around the head, forward and backward together
    times = 8 + 4 * recomputed + 4 / blocks
    yield Collective(micro_batches * times * memory.block_inputs, plan.mesh_shape.tp, 1)


def cp_collectives(plan: RunPlan, micro_batches: int, recomputed: float) -> Iterator[Collective]:
    """Yield the gathers of keys and values, with the reductions of their gradients, and what measuring the gradient
    noise reduces of every micro-batch, on average over steps."""
    cp, tp, training = plan.mesh_shape.cp, plan.mesh_shape.tp, plan.recipe.training
    keys = key_value_bytes(plan.model, training, plan.dtype.itemsize) / tp
    yield Collective(micro_batches * len(transformer_blocks(plan.model)) * (2 + recomputed) * keys, cp, tp)
    interval = plan.recipe.gradient_noise.interval_steps
    if interval is not None:
        yield Collective(micro_batches / interval * 4 * numel_per_tp_rank(plan.model, tp), cp, tp)


def adam_norm_collectives(plan: RunPlan) -> Iterator[Collective]:
    """Yield the gather of the factors of the norm of Adam, on average over steps."""
    noise, mesh_shape = plan.recipe.gradient_noise, plan.mesh_shape
    if "adam" in noise.norms and noise.interval_steps is not None:
        size = 2 * sum(parameter.numel() for parameter in plan.model.parameters()) / noise.interval_steps
        yield Collective(size, mesh_shape.fsdp_size, mesh_shape.tp)


def update_collectives(plan: RunPlan) -> Iterator[Collective]:
    """Yield the exchange of matrices in an optimizer step: shards to the owner of each matrix, and updates back."""
    if plan.update_cost is None:
        return
    mesh_shape = plan.mesh_shape
    size = plan.update_cost.elements * plan.dtype.itemsize
    shards = mesh_shape.fsdp_size * mesh_shape.tp
    if shards > 1:
        yield Collective(size / mesh_shape.world_size, mesh_shape.world_size, 1, distinct=True)
    yield Collective(size / shards, mesh_shape.world_size, 1, distinct=True)


def launch_seconds(plan: RunPlan, *, local: bool) -> float:
    """Return the CPU seconds of launching one micro-batch on a GPU server."""
    training, blocks = plan.recipe.training, len(transformer_blocks(plan.model))
    compiled = training.compiles(torch.device("cuda"))
    if plan.mesh_shape.tp > 1:
        return blocks * LAUNCH_SECONDS["tp"]["compiled" if compiled else "eager"] / HOST_SPEEDUP
    costs = LAUNCH_SECONDS[_model_kind(plan.model)]
    mode = training.activation_checkpoint
    if compiled:
        block = costs["compiled"]
    elif isinstance(mode, int):
        block = costs["none"] + (costs["full"] - costs["none"]) / mode
    else:
        block = costs[mode]
    if plan.mesh_shape.world_size > 1:
        block += LAUNCH_SECONDS["fsdp"]["once_per_step" if local else "every_micro_batch"]
    return blocks * block / HOST_SPEEDUP


def recomputed_fraction(mode: str | int) -> float:
    """Return the fraction of the blocks that run forward again in the backward pass."""
    return 1 / mode if isinstance(mode, int) else float(mode != "none")


def _model_kind(model: nn.Module) -> str:
    return "experts" if any(parameter.ndim == 3 for parameter in model.parameters()) else "dense"
