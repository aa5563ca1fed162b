"""[branches], and the batch and learning rate with which the run of a checkpoint would continue."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from components.batch import BatchRounding
from components.checkpoint import verify
from components.clock import TrainingClock
from components.errors import InputError
from components.json_files import read_object
from components.units import PositiveCount
from recipes.batch_policy import build_batch_policy
from recipes.config import Config
from recipes.resume import find_checkpoint_at
from recipes.stored_config import load_stored_config
from recipes.training_state import read_run_state


@dataclass(frozen=True, kw_only=True)
class Branches:
    """[branches]: the checkpoint to branch from, the length of branches, and how to compare them."""

    checkpoint: Path
    """The checkpoint to branch from, or a run directory (its newest checkpoint)."""
    tokens: PositiveCount
    """Length of each branch; rounded up to whole steps of the largest batch."""
    batch_multipliers: tuple[PositiveCount, ...] = (1, 2, 4, 8, 16)
    """The batch of each branch, as a multiple of B; the learning rate grows with its square root."""
    tolerance: Annotated[float, Field(ge=0)] = 0.01
    """Allowed increase of the final loss over that of the first branch, in nats per token."""
    smoothing_tokens: PositiveCount | None = None
    """Tokens over which the moving average of the training loss decays by 1/e; unset: a quarter of `tokens`."""
    batch: PositiveCount | None = None
    """B, in samples; unset: the batch of the next step of the checkpoint's run."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of the first branch; unset: that of the next step of the checkpoint's run."""

    def __post_init__(self) -> None:
        if self.batch_multipliers[:1] != (1,):
            raise InputError(
                "batch_multipliers",
                f"{list(self.batch_multipliers)} do not start at 1, the branch that the others are compared with",
            )
        if any(
            one >= next_one for one, next_one in zip(self.batch_multipliers, self.batch_multipliers[1:], strict=False)
        ):
            raise InputError("batch_multipliers", f"{list(self.batch_multipliers)} do not increase")


@dataclass(frozen=True)
class BranchPoint:
    """The checkpoint, batch and learning rate of the first branch."""

    checkpoint: str
    step: int
    tokens: int
    batch: int
    """B in samples, rounded to the mesh."""
    lr: float

    def batch_of(self, multiplier: int) -> int:
        """Return the batch of branch k = `multiplier`, in samples."""
        return multiplier * self.batch

    def lr_of(self, multiplier: int) -> float:
        """Return the learning rate of branch k = `multiplier`: that of the first branch, times sqrt(k)."""
        return self.lr * math.sqrt(multiplier)


def read_branch_point(file: Path) -> BranchPoint:
    """Return the branch point stored in `file`. Raises ValueError if it is damaged."""
    try:
        return BranchPoint(**read_object(file))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from None


def find_branch_point(branches: Branches, rounding: BatchRounding, config: Config) -> BranchPoint:
    """Return where `branches` start. Raises InputError at the key that is at fault."""
    try:
        checkpoint = find_checkpoint_at(branches.checkpoint)
        verify(checkpoint)
        state = read_run_state(checkpoint)
    except ValueError as error:
        raise InputError("checkpoint", str(error)) from None
    batch, lr = branches.batch, branches.lr
    if batch is None or lr is None:
        try:
            run = load_stored_config(checkpoint, trusted_config=config, remedy="set batch and lr instead").recipe
        except ValueError as error:
            raise InputError("checkpoint", str(error)) from None
        clock = TrainingClock(run.training.total_tokens, run.training.sequence_length)
        clock.load_state_dict(state["clock"])
        if batch is None:
            policy = build_batch_policy(run)
            policy.load_state_dict(state["batch"])
            batch = policy.next_batch_size(clock)
        if lr is None:
            batch_tokens = rounding.round_up(batch).samples * clock.sequence_length
            lr = run.lr_schedule.lr(clock.tokens, batch_tokens, clock.total_tokens)
        if not (math.isfinite(lr) and lr > 0):
            raise InputError(
                "lr",
                f"the learning rate of the next step after {checkpoint} is {lr}; set branches.lr or branch earlier",
            )
    return BranchPoint(
        checkpoint=str(checkpoint),
        step=state["clock"]["step"],
        tokens=state["clock"]["tokens"],
        batch=rounding.round_up(batch).samples,
        lr=lr,
    )
