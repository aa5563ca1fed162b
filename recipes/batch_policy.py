"""Build the batch policy of a recipe and the rounding of its batches, and check that the policy can adapt."""

from __future__ import annotations

from typing import Any

from components.batch import AdaptivePolicy, BatchPolicy, BatchRounding, Progress, complete_policy
from components.errors import InputError
from recipes.interfaces import complete_schedule


def build_batch_policy(recipe: Any) -> BatchPolicy:
    """Return a new policy for one run of `recipe`, without changing its [batch].

    Raises ValueError if [batch] and [lr_schedule] cannot be combined.
    """
    training = recipe.training
    return complete_policy(
        recipe.batch.build(
            schedule=complete_schedule(recipe.lr_schedule),
            sequence_length=training.sequence_length,
            total_tokens=training.total_tokens,
        )
    )


def build_batch_rounding(recipe: Any, world_size: int) -> BatchRounding:
    """Return the rule that rounds batches up to the mesh of `world_size` processes. Raises InputError at [parallel]."""
    return BatchRounding(recipe.training.micro_batch_size, recipe.parallel.mesh_shape(world_size).dp_size)


def uses_adaptive_batch(recipe: Any) -> bool:
    """Return whether the batch policy adapts; False if no policy can be built, which is reported elsewhere."""
    try:
        return build_batch_policy(recipe).is_adaptive
    except ValueError:
        return False


def require_measurable_noise(policy: BatchPolicy, rounding: BatchRounding, progress: Progress) -> None:
    """Raise InputError if an adaptive policy starts with one micro-batch per step, whose noise cannot be measured."""
    if not policy.is_adaptive:
        return
    batch = rounding.round_up(policy.next_batch_size(progress))
    if not rounding.can_measure_noise(batch):
        raise InputError(
            "initial_size" if isinstance(policy, AdaptivePolicy) else "",
            f"a step of {batch.samples} samples is one micro-batch, and gradient noise needs at least 2 per step, so "
            "the batch could never change; use "
            f"{2 * rounding.samples_per_micro_step} or lower training.micro_batch_size",
        )
