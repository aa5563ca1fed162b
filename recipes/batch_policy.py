"""Build the batch policy of a recipe."""

from __future__ import annotations

from typing import Any

from components.batch import BatchPolicy, BatchRounding, Progress, complete_policy
from components.errors import InputError
from recipes.interfaces import complete_schedule


def build_batch_policy(recipe: Any) -> BatchPolicy:
    """Return a new policy for one run of `recipe`, whose [batch] is not changed.

    Raises ValueError where [batch] and [lr_schedule] do not go together.
    """
    training = recipe.training
    return complete_policy(
        recipe.batch.build(
            schedule=complete_schedule(recipe.lr_schedule),
            sequence_length=training.sequence_length,
            total_tokens=training.total_tokens,
        )
    )


def require_measurable_noise(policy: BatchPolicy, layout: BatchRounding, progress: Progress) -> None:
    """Raise InputError if an adaptive policy could never change the batch, because its noise cannot be measured."""
    if not policy.is_adaptive:
        return
    batch = layout.round_up(policy.next_batch_size(progress))
    if not layout.can_measure_noise(batch):
        raise InputError(
            "initial",
            f"a step of {batch.samples} samples is one micro-batch and does not show the noise of its "
            f"gradient, so the batch could never change; take {2 * layout.samples_per_micro_step} "
            "or a smaller training.micro_batch_size",
        )
