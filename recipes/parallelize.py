"""Parallelize a model on the meta device, and allocate it."""

from __future__ import annotations

import torch
from torch import nn

from components.activation_checkpointing import apply_activation_checkpointing
from components.distributed import fsdp
from components.distributed.parallel_dims import ParallelDims
from models.compilation import raise_recompile_limit
from recipes.interfaces import HasParallelPlan, ModelConfig
from recipes.model_setup import transformer_blocks
from recipes.run_config import TrainingConfig


def parallelize(
    model: nn.Module,
    component: ModelConfig,
    mesh: ParallelDims,
    compute_dtype: torch.dtype,
    device: torch.device,
    training: TrainingConfig | None = None,
) -> None:
    """Apply tensor and context parallelism, activation checkpointing, compile and FSDP2 to `model`, in that order.

    `component` is the [model] that built it, which may have a parallel plan. Without `training` there is neither
    activation checkpointing nor compile.
    """
    blocks = list(transformer_blocks(model).values())
    head = [model.get_submodule("output")] if hasattr(model, "output") else []
    plan = component.plan(tp=mesh.mesh_shape.tp) if isinstance(component, HasParallelPlan) else None
    if mesh.tp is not None and plan is not None:
        from components.distributed import tensor_parallel  # not at the top: a single process does not need it

        tensor_parallel.apply_tensor_parallel(model, plan.tensor_parallel, mesh.tp)
    if mesh.cp is not None:
        from components.distributed.context_parallel import ContextParallelRanks

        model.enable_context_parallelism(ContextParallelRanks(mesh.cp))  # type: ignore[operator]
    if training is not None:
        apply_activation_checkpointing(blocks or [model], training.activation_checkpoint)
        if training.compiles(device):
            raise_recompile_limit()
            for module in [*blocks, *head] if blocks else [model]:
                module.compile()
    if mesh.fsdp is not None:
        fsdp.apply_fsdp(model, plan.fsdp_groups if plan is not None else [], mesh.fsdp, compute_dtype)


def materialize(model: nn.Module, device: torch.device) -> None:
    """Allocate `model` on `device`, uninitialized, and keep shared parameters shared, which `to_empty` does not."""
    uses: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            uses.setdefault(id(parameter), []).append((module, name))
    model.to_empty(device=device)
    for (owner, own_name), *others in uses.values():
        for module, name in others:
            module.register_parameter(name, owner.get_parameter(own_name))
