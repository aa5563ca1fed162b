"""The best learning rate of a sweep, and its law: eta_opt / beta = a T^b (Shen et al. 2024, arXiv 2408.13359, eq. 6).

beta is the batch in sequences of 4096 tokens, T the tokens of a run. The optimum of a cell is the vertex of a parabola
through losses against log rate. The law is a line through the logarithms of the optima, by least squares; its intervals
are Student's, from how far the optima lie off it, so they hold what noise, seeds and a law that does not fit do alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

PUBLISHED_A, PUBLISHED_B = 4.6, -0.51
"""The law of the paper; its scheduler takes a = 4."""
REACH = 2.1
"""Rates within this factor of the best join the parabola, and at least the neighbours."""
CONFIDENCE = 0.95
APART = 1.5
"""Lengths of a law differ by this factor at least: those of one nominal length differ by how steps fill it."""


@dataclass(frozen=True)
class Optimum:
    """The best rate of a cell."""

    log_rate: float
    error: float | None
    """Standard error of log_rate from the scatter about the parabola; None with no more losses than it has numbers."""
    loss: float
    """At the vertex."""

    @property
    def rate(self) -> float:
        return math.exp(self.log_rate)


Unknown = Literal["below the grid", "above the grid", "beside a failed run", "no minimum"]
"""Why a cell has no optimum; the parabola may also open downwards, or there is one rate only: no minimum."""


def optimum(losses: Mapping[float, Sequence[float]]) -> Optimum | Unknown:
    """Of rate -> losses by seed, not finite where a run failed: such a rate is out, and bounds the grid."""
    means = {rate: sum(each) / len(each) for rate, each in sorted(losses.items())}
    usable = [rate for rate, mean in means.items() if math.isfinite(mean)]
    if not usable or len(means) == 1:
        return "no minimum"
    best = usable.index(min(usable, key=means.__getitem__))
    if best == 0:
        return "below the grid" if usable[0] == min(means) else "beside a failed run"
    if best == len(usable) - 1:
        return "above the grid" if usable[-1] == max(means) else "beside a failed run"
    near = {usable[best + offset] for offset in (-1, 0, 1)}
    near |= {rate for rate in usable if max(rate / usable[best], usable[best] / rate) <= REACH}
    points = [(math.log(rate / usable[best]), loss) for rate in sorted(near) for loss in losses[rate]]
    x, y = np.array(points).T
    line = regress(np.stack([np.ones_like(x), x, x**2], axis=1), y)
    c, b, a = line.coefficients
    if a <= 0:
        return "no minimum"
    vertex = -b / (2 * a)
    error = None
    if line.degrees_of_freedom > 0:  # by how the vertex moves with b and a
        slope = np.array([0.0, -1 / (2 * a), b / (2 * a**2)])
        error = math.sqrt(slope @ line.covariance @ slope)
    return Optimum(float(math.log(usable[best]) + vertex), error, float(c - b**2 / (4 * a)))


@dataclass(frozen=True)
class Point:
    """The optimum of one cell, for the law."""

    tokens: float
    """T."""
    beta: float
    rate: float


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"


@dataclass(frozen=True)
class Law:
    """gamma = eta_opt / beta = a T^b."""

    a: Estimate
    b: Estimate
    middle: float
    """The geometric mean of T over the cells."""
    gamma: Estimate
    """At the middle, where it is known best: a is its extrapolation to a single token."""
    batch_exponent: Estimate | None
    """c of eta_opt = a T^b beta^c, where c is free: the law takes it to be 1. None with too few kinds of cells."""
    cells: int


def fit_law(points: Sequence[Point]) -> Law:
    """Raises ValueError where the cells do not determine it."""
    lengths = [point.tokens for point in points]
    if len(points) < 3 or max(lengths) < APART * min(lengths):
        raise ValueError(
            "the law needs three cells or more with an optimum inside the grid, at two or more lengths, "
            f"a factor of {APART:g} apart at least"
        )
    tokens, beta, rate = (np.log([getattr(point, name) for point in points]) for name in ("tokens", "beta", "rate"))
    middle = tokens.mean()
    ones = np.ones_like(tokens)
    line = regress(np.stack([ones, tokens - middle], axis=1), rate - beta)
    at_one = regress(np.stack([ones, tokens], axis=1), rate - beta)
    free = None
    if len({point.beta for point in points}) > 1 and len(points) > 3:
        columns = np.stack([ones, tokens - middle, beta - beta.mean()], axis=1)
        if np.linalg.matrix_rank(columns) == 3:
            free = regress(columns, rate).estimate(2)
    return Law(
        a=_exponential(at_one.estimate(0)),
        b=line.estimate(1),
        middle=float(math.exp(middle)),
        gamma=_exponential(line.estimate(0)),
        batch_exponent=free,
        cells=len(points),
    )


@dataclass(frozen=True)
class Regression:
    """Least squares."""

    coefficients: np.ndarray
    covariance: np.ndarray
    """Not a number where there is no degree of freedom to tell it from."""
    degrees_of_freedom: int

    def estimate(self, index: int) -> Estimate:
        value = float(self.coefficients[index])
        reach = students_t(self.degrees_of_freedom) * math.sqrt(self.covariance[index, index])
        return Estimate(value, value - reach, value + reach)


def regress(columns: np.ndarray, y: np.ndarray) -> Regression:
    """`y` (n,) on `columns` (n, k)."""
    coefficients, *_ = np.linalg.lstsq(columns, y, rcond=None)
    freedom = len(y) - columns.shape[1]
    residual = y - columns @ coefficients
    variance = residual @ residual / freedom if freedom > 0 else math.nan
    return Regression(coefficients, variance * np.linalg.inv(columns.T @ columns), freedom)


@cache
def students_t(degrees_of_freedom: int, confidence: float = CONFIDENCE) -> float:
    """What Student's t stays within, either side of zero: t = sqrt(n) tan(x), with a density of x ~ cos(x)^(n - 1)."""
    angle = np.linspace(0, math.pi / 2, 100_001)
    density = np.cos(angle) ** (degrees_of_freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return float(math.sqrt(degrees_of_freedom) * math.tan(np.interp(confidence, mass / mass[-1], angle)))


def _exponential(of: Estimate) -> Estimate:
    with np.errstate(over="ignore"):  # an interval may be wider than numbers are
        return Estimate(*(float(np.exp(number)) for number in (of.value, of.low, of.high)))
