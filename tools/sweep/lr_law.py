"""The best learning rate of a sweep, and its law: eta_opt / beta = a T^b (Shen et al. 2024, arXiv 2408.13359, eq. 6).

beta is the batch in sequences of 4096 tokens, T the tokens of a run. The optimum of a group is the vertex of a parabola
through losses against log learning rate. The law is a line through the logarithms of the optima, by least squares; its
intervals are Student's t from the residuals, so they cover noise, seeds and the misfit of the law.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

PUBLISHED_A, PUBLISHED_B = 4.6, -0.51
"""The law of the paper; its scheduler uses a = 4."""
FIT_RADIUS = 2.1
"""Learning rates within this factor of the best join the parabola, and at least its neighbors."""
CONFIDENCE = 0.95
MIN_LENGTH_FACTOR = 1.5
"""Lengths of a law differ at least by this factor: runs of one nominal length differ by how steps fill it."""


@dataclass(frozen=True)
class Optimum:
    """The best learning rate of a group."""

    log_lr: float
    error: float | None
    """Standard error of log_lr from the residuals of the parabola; None with no more losses than coefficients."""
    loss: float
    """The loss at the vertex."""

    @property
    def lr(self) -> float:
        return math.exp(self.log_lr)


NoOptimum = Literal["below the grid", "above the grid", "next to a failed run", "no minimum"]
"""Why a group has no optimum; "no minimum": the parabola opens downwards, or there is one learning rate only."""


def find_optimum(losses: Mapping[float, Sequence[float]]) -> Optimum | NoOptimum:
    """Return the vertex of the parabola through `losses`: learning rate -> losses by seed.

    Losses of failed runs are not finite: such a learning rate is left out, and bounds the grid.
    """
    means = {lr: sum(each) / len(each) for lr, each in sorted(losses.items())}
    usable = [lr for lr, mean in means.items() if math.isfinite(mean)]
    if not usable or len(means) == 1:
        return "no minimum"
    best = usable.index(min(usable, key=means.__getitem__))
    if best == 0:
        return "below the grid" if usable[0] == min(means) else "next to a failed run"
    if best == len(usable) - 1:
        return "above the grid" if usable[-1] == max(means) else "next to a failed run"
    near = {usable[best + offset] for offset in (-1, 0, 1)}
    near |= {lr for lr in usable if max(lr / usable[best], usable[best] / lr) <= FIT_RADIUS}
    points = [(math.log(lr / usable[best]), loss) for lr in sorted(near) for loss in losses[lr]]
    x, y = np.array(points).T
    parabola = Regression.fit(np.stack([np.ones_like(x), x, x**2], axis=1), y)
    c, b, a = parabola.coefficients
    if a <= 0:
        return "no minimum"
    vertex = -b / (2 * a)
    error = None
    if parabola.degrees_of_freedom > 0:  # error propagation: how the vertex moves with b and a
        gradient = np.array([0.0, -1 / (2 * a), b / (2 * a**2)])
        error = math.sqrt(gradient @ parabola.covariance @ gradient)
    return Optimum(float(math.log(usable[best]) + vertex), error, float(c - b**2 / (4 * a)))


@dataclass(frozen=True)
class OptimumPoint:
    """The optimum of one group, for the law."""

    tokens: float
    """T."""
    beta: float
    lr: float


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"

    def exp(self) -> Estimate:
        with np.errstate(over="ignore"):  # an interval may be wider than the range of numbers
            return Estimate(*(float(np.exp(number)) for number in (self.value, self.low, self.high)))


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


@dataclass(frozen=True)
class Regression:
    """Linear least squares."""

    coefficients: np.ndarray
    covariance: np.ndarray
    """nan without a degree of freedom to estimate it from."""
    degrees_of_freedom: int

    @classmethod
    def fit(cls, columns: np.ndarray, y: np.ndarray) -> Regression:
        """Fit `y` (n,) on `columns` (n, k)."""
        coefficients, *_ = np.linalg.lstsq(columns, y, rcond=None)
        freedom = len(y) - columns.shape[1]
        residual = y - columns @ coefficients
        variance = residual @ residual / freedom if freedom > 0 else math.nan
        return cls(coefficients, variance * np.linalg.inv(columns.T @ columns), freedom)

    def estimate(self, index: int) -> Estimate:
        """Return a coefficient with its interval of Student's t. Raises ValueError without scipy."""
        return self.at(np.eye(len(self.coefficients))[index])

    def at(self, row: Sequence[float] | np.ndarray) -> Estimate:
        """Return the value of the fit for a `row` (k,) of columns, with the same interval. Raises ValueError."""
        try:
            from scipy import stats
        except ModuleNotFoundError:
            raise ValueError("intervals need scipy: pip install -e '.[plot]'") from None
        row = np.asarray(row)
        error = math.sqrt(row @ self.covariance @ row)
        reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, self.degrees_of_freedom)) * error
        value = float(row @ self.coefficients)
        return Estimate(value, value - reach, value + reach)
