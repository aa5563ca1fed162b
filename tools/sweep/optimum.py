"""The best learning rate of a group of runs, and linear least squares with intervals of Student's t.

The best learning rate is the vertex of a parabola through losses against log learning rate. Intervals come from the
residuals, so they cover noise, seeds and the misfit of the law.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from components.errors import extra_required

FIT_RADIUS = 2.1
"""Learning rates within this factor of the best join the parabola, and at least its neighbors."""
CONFIDENCE = 0.95


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
        with extra_required("an interval", "scipy", "plot"):
            from scipy import stats
        row = np.asarray(row)
        error = math.sqrt(row @ self.covariance @ row)
        reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, self.degrees_of_freedom)) * error
        value = float(row @ self.coefficients)
        return Estimate(value, value - reach, value + reach)
