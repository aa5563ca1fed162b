"""The law of the best learning rates of a sweep: eta_opt / beta = a T^b (Shen et al. 2024, arXiv 2408.13359, eq. 6).

beta is the batch in sequences of 4096 tokens, T the tokens of a run. The law is a line through the logarithms of the
optima of the groups, by least squares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from components.lr_schedules import POWER_LAW_SEQ_LEN
from tools.sweep.groups import Group
from tools.sweep.optimum import Estimate, Optimum, Regression

PUBLISHED_A, PUBLISHED_B = 4.6, -0.51
"""The law of the paper; its scheduler uses a = 4."""
MIN_LENGTH_FACTOR = 1.5
"""Lengths of a law differ at least by this factor: runs of one nominal length differ by how steps fill it."""
SAME_LR_FACTOR = 1.01
"""Learning rates within this factor are equal: a warm-up in whole steps may end a little below its peak."""


@dataclass(frozen=True)
class OptimumPoint:
    """The optimum of one group, for the law."""

    tokens: float
    """T."""
    beta: float
    lr: float


@dataclass(frozen=True)
class LRLaw:
    """gamma = eta_opt / beta = a T^b."""

    a: Estimate
    b: Estimate
    middle: float
    """The geometric mean of T over the groups."""
    gamma: Estimate
    """gamma at the middle, where it is known best: a is its extrapolation to a single token."""
    batch_exponent: Estimate | None
    """c of eta_opt = a T^b beta^c, where c is free: the law assumes 1. None with too few kinds of groups."""
    groups: int


def fit_law(points: Sequence[OptimumPoint]) -> LRLaw:
    """Fit the law. Raises ValueError if the groups do not determine it."""
    lengths = [point.tokens for point in points]
    if len(points) < 3 or max(lengths) < MIN_LENGTH_FACTOR * min(lengths):
        raise ValueError(
            "the law needs three groups or more with an optimum inside the grid, at two or more lengths, "
            f"a factor of {MIN_LENGTH_FACTOR:g} apart at least"
        )
    tokens, beta, lr = (np.log([getattr(point, name) for point in points]) for name in ("tokens", "beta", "lr"))
    middle = tokens.mean()
    ones = np.ones_like(tokens)
    line = Regression.fit(np.stack([ones, tokens - middle], axis=1), lr - beta)
    at_one = Regression.fit(np.stack([ones, tokens], axis=1), lr - beta)
    free = None
    if len({point.beta for point in points}) > 1 and len(points) > 3:
        columns = np.stack([ones, tokens - middle, beta - beta.mean()], axis=1)
        if np.linalg.matrix_rank(columns) == 3:
            free = Regression.fit(columns, lr).estimate(2)
    return LRLaw(
        a=at_one.estimate(0).exp(),
        b=line.estimate(1),
        middle=float(math.exp(middle)),
        gamma=line.estimate(0).exp(),
        batch_exponent=free,
        groups=len(points),
    )


def peak_lr_factor(group: Group) -> float | None:
    """Return the peak learning rate of the runs over the one that is tuned; None if that is not one number."""
    factors = [run.peak_lr / lr for lr, each in group.outcomes.items() for run in each if run.failure is None]
    return factors[0] if max(factors) <= SAME_LR_FACTOR * min(factors) else None


def optimum_points(groups: Sequence[Group]) -> list[OptimumPoint]:
    """Return the optima that lie inside the grid, as peak learning rates."""
    found = ((group, group.optimum, peak_lr_factor(group)) for group in groups)
    return [
        OptimumPoint(group.tokens, group.tokens / group.finished[0].steps / POWER_LAW_SEQ_LEN, best.lr * factor)
        for group, best, factor in found
        if isinstance(best, Optimum) and factor
    ]
