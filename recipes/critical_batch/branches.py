"""[branches], and where they begin: the batch and the rate with which the run of a checkpoint would go on."""

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
from components.units import PositiveCount
from recipes.batch_policy import build_batch_policy
from recipes.config import Config
from recipes.resume import find_checkpoint_at
from recipes.stored_config import load_stored_config
from recipes.training_state import read_run_state


@dataclass(frozen=True, kw_only=True)
class Branches:
    """[branches]: where to start, how far to go, and how to compare."""

    checkpoint: Path
    """The checkpoint to branch from, or a run directory: its newest."""
    tokens: PositiveCount
    """Length of each branch; rounded up to whole steps of the largest batch."""
    factors: tuple[PositiveCount, ...] = (1, 2, 4, 8, 16)
    """The batch of each branch, as a multiple of B; the rate grows with the square root."""
    tolerance: Annotated[float, Field(ge=0)] = 0.01
    """How far above that of the first branch a loss may end, in nats a token."""
    smoothing_tokens: PositiveCount | None = None
    """Tokens over which the moving average of the training loss decays by 1/e; unset: a quarter of `tokens`."""
    batch: PositiveCount | None = None
    """B, in samples; unset: what the checkpoint's run would take next."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """The rate of the first branch; unset: what the checkpoint's run would use next."""

    def __post_init__(self) -> None:
        if self.factors[:1] != (1,):
            raise InputError("factors", f"{list(self.factors)} do not start at 1, with which the others are compared")
        if any(one >= next_one for one, next_one in zip(self.factors, self.factors[1:], strict=False)):
            raise InputError("factors", f"{list(self.factors)} do not increase")


@dataclass(frozen=True)
class BranchPoint:
    """Where the branches begin."""

    checkpoint: str
    step: int
    tokens: int
    batch: int
    """B, as the layout makes it."""
    lr: float


def find_branch_point(branches: Branches, layout: BatchRounding, config: Config) -> BranchPoint:
    """Where those of the recipe in `config` begin. Raises ValueError, at the key it names, where nothing can."""
    try:
        checkpoint = complete_checkpoint(branches.checkpoint)
        verify(checkpoint)
        state = read_run_state(checkpoint)
    except ValueError as error:
        raise InputError("checkpoint", str(error)) from None
    batch, lr = branches.batch, branches.lr
    if batch is None or lr is None:
        try:
            run = load_stored_config(checkpoint, like=config, remedy="set batch and lr instead").recipe
        except ValueError as error:
            raise InputError("checkpoint", str(error)) from None
        clock = TrainingClock(run.training.total_tokens, run.training.sequence_length)
        clock.load_state_dict(state["clock"])
        if batch is None:
            policy = build_batch_policy(run)
            policy.load_state_dict(state["batch"])
            batch = policy.next_batch_size(clock)
        if lr is None:
            batch_tokens = layout.round_up(batch).samples * clock.sequence_length
            lr = run.lr_schedule.lr(clock.tokens, batch_tokens, clock.total_tokens)
        if not (math.isfinite(lr) and lr > 0):
            raise InputError("lr", f"the schedule of {checkpoint} has come to {lr}; give a rate, or branch earlier")
    return BranchPoint(
        checkpoint=str(checkpoint),
        step=state["clock"]["step"],
        tokens=state["clock"]["tokens"],
        batch=layout.round_up(batch).samples,
        lr=lr,
    )


def complete_checkpoint(path: Path) -> Path:
    """As `checkpoint_at`, with every file it takes. Raises ValueError."""
    checkpoint = find_checkpoint_at(path)
    missing = [name for name in ("config.toml", ".metadata") if not (checkpoint / name).is_file()]
    if missing or checkpoint.name.startswith(".") or not any(checkpoint.glob("*.distcp")):
        what = missing[0] if missing else "tensors" if not any(checkpoint.glob("*.distcp")) else "final name"
        raise ValueError(f"{checkpoint} is incomplete: it has no {what}; take another one")
    return checkpoint
