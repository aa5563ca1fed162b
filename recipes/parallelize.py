"""A model made ready for its processes, while it has no storage yet."""

from __future__ import annotations

import torch
from torch import nn

from components.activation_checkpointing import apply_activation_checkpointing
from components.distributed import fsdp
from components.distributed.parallel_dims import ParallelDims
from recipes.interfaces import HasParallelPlan, ModelConfig
from recipes.model_setup import transformer_blocks
from recipes.run_config import TrainingConfig


def parallelize(
    model: nn.Module,
    component: ModelConfig,
    layout: ParallelDims,
    compute_dtype: torch.dtype,
    device: torch.device,
    training: TrainingConfig | None = None,
) -> None:
    """Slice, recompute, compile and shard `model`, built by `component`, in the order in which they wrap one another.

    What recomputing and compiling have to be is in `training`; without it there is neither.
    """
    blocks = list(transformer_blocks(model).values())
    head = [model.get_submodule("output")] if hasattr(model, "output") else []
    plan = component.plan(tp=layout.mesh_shape.tp) if isinstance(component, HasParallelPlan) else None
    if layout.tp is not None and plan is not None:
        from components.distributed import tensor_parallel  # a process alone has no use for it

        tensor_parallel.apply_tensor_parallel(model, plan.tensor_parallel, layout.tp)
    if training is not None:
        apply_activation_checkpointing(blocks or [model], training.activation_checkpoint)
        if training.compiles(device):
            for module in [*blocks, *head] if blocks else [model]:
                module.compile()
    if layout.fsdp is not None:
        fsdp.apply_fsdp(model, plan.fsdp_groups if plan is not None else [], layout.fsdp, compute_dtype)
