"""A model made ready for its processes, while it has no storage yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from components.parallel import fsdp
from components.parallel.layout import Layout
from components.recompute import recompute
from recipes.contracts import HasPlan

if TYPE_CHECKING:
    from recipes.pretrain import Pretrain


def divide(model: nn.Module, recipe: Pretrain, layout: Layout, compute_dtype: torch.dtype) -> None:
    """Slice, recompute, compile and shard `model` as `recipe` says: in the order in which they wrap one another."""
    training = recipe.training
    blocks = list(model.get_submodule("layers").children()) if hasattr(model, "layers") else []
    plan = recipe.model.plan(tp=recipe.parallel.tp) if isinstance(recipe.model, HasPlan) else None
    if layout.tp is not None and plan is not None:
        from components.parallel import tensor_parallel  # a process alone has no use for it

        tensor_parallel.split(model, plan.tensor_parallel, layout.tp)
    recompute(blocks or [model], training.activation_checkpoint)
    if training.compile:
        for block in blocks or [model]:
            block.compile()
    if layout.fsdp is not None:
        fsdp.shard(model, plan.units if plan is not None else [], layout.fsdp, compute_dtype)
