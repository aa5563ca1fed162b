"""The laws of a plan: the loss of a size and a length, and power laws of the learning rate and of the noise scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from components.errors import extra_required
from tools.sweep.optimum import CONFIDENCE, Estimate, Regression

STARTS = tuple((alpha, beta) for alpha in (0.2, 0.5, 1.0) for beta in (0.2, 0.5, 1.0))
"""Exponents from which the fit starts."""
HUBER = 1e-3
"""Residuals of log loss beyond this count less, as in arXiv 2203.15556, appendix D.2."""
BOOTSTRAP_FITS = 100
SEED_DEVIATION = 0.003
"""Standard deviation of log loss between seeds where only one was run: some 0.35 % at a million parameters, as in the
table of docs/findings.md on runs without decay."""
MAX_EXPONENT = 2.0


@dataclass(frozen=True)
class LossPoint:
    """The loss of one size and length, at its best learning rate."""

    parameters: float
    tokens: float
    loss: float
    seed_deviation: float = SEED_DEVIATION
    """Standard deviation between seeds of the logarithm of the loss."""
    seeds: int = 1


@dataclass(frozen=True)
class LossLaw:
    """loss = e + a (N / middle N)^-alpha + b (D / middle D)^-beta, in nats per token (arXiv 2203.15556, equation 2)."""

    e: float
    a: float
    alpha: float
    b: float
    beta: float
    middle: tuple[float, float]
    """The geometric means of N and D over the points."""

    @classmethod
    def fit(cls, points: Sequence[LossPoint]) -> LossLaw:
        """Fit the logarithms of the losses. Raises ValueError for too few sizes or lengths, and without scipy."""
        _require_spread(points)
        return _fit(points, STARTS)

    def loss(self, parameters: float, tokens: float) -> float:
        """Return the loss of a model of `parameters` that are multiplied, after `tokens`."""
        n, d = parameters / self.middle[0], tokens / self.middle[1]
        return float(self.e + self.a * n**-self.alpha + self.b * d**-self.beta)

    def undetermined(self, points: Sequence[LossPoint]) -> list[str]:
        """Return the parameters that the points do not determine.

        An exponent is not, if its term changes over the points by less than four residuals, or if it ended at its
        limit; the constant is not, if it ended near zero.
        """
        residual = 4 * math.sqrt(float(np.mean(self._residuals(points) ** 2)))
        n, d = ([getattr(point, name) for point in points] for name in ("parameters", "tokens"))
        change_n = self.loss(min(n), min(d)) - self.loss(max(n), min(d))
        change_d = self.loss(min(n), min(d)) - self.loss(min(n), max(d))
        limits = {
            "e": self.e < 0.01 * (self.a + self.b),
            "alpha": self.alpha > 0.99 * MAX_EXPONENT or change_n < residual * self.loss(min(n), min(d)),
            "beta": self.beta > 0.99 * MAX_EXPONENT or change_d < residual * self.loss(min(n), min(d)),
        }
        return [name for name, reached in limits.items() if reached]

    def interval(self, points: Sequence[LossPoint], parameters: float, tokens: float) -> Estimate:
        """Return the predicted loss with its 95 % interval; it holds if the law does.

        The law is fitted again to losses with resampled residuals, which are enlarged by the points over the degrees of
        freedom, and with an error of each size: its runs share a seed, so that their errors are the same.
        """
        fitted, residuals = self._fitted(points), self._residuals(points)
        residuals = residuals * math.sqrt(len(points) / max(1, len(points) - 5))
        random, found = np.random.default_rng(0), []
        seed_deviation = max(point.seed_deviation for point in points)
        for _ in range(BOOTSTRAP_FITS):
            seeds = {size: random.standard_normal() for size in {point.parameters for point in points}}
            shared = np.array([seeds[p.parameters] * p.seed_deviation / math.sqrt(p.seeds) for p in points])
            losses = np.exp(fitted + shared + random.choice(residuals, len(points)))
            drawn = [replace(point, loss=loss) for point, loss in zip(points, losses, strict=True)]
            own = random.standard_normal() * seed_deviation
            law = _fit(drawn, [(self.alpha, self.beta)])
            found.append(law.loss(parameters, tokens) * math.exp(random.choice(residuals) + own))
        low, high = np.quantile(found, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        value = self.loss(parameters, tokens)
        return Estimate(value, min(value, float(low)), max(value, float(high)))

    def _fitted(self, points: Sequence[LossPoint]) -> Any:
        return np.log([self.loss(each.parameters, each.tokens) for each in points])

    def _residuals(self, points: Sequence[LossPoint]) -> Any:
        return np.log([each.loss for each in points]) - self._fitted(points)

    def __str__(self) -> str:
        n, d = self.middle
        return (
            f"{self.e:.3g} + {self.a:.3g} (N / {n:.3g})^-{self.alpha:.3g} + {self.b:.3g} (D / {d:.3g})^-{self.beta:.3g}"
        )


def error_on_largest(points: Sequence[LossPoint]) -> float | None:
    """Return how far a law of the smaller sizes is off at the longest run of the largest, as a fraction of its loss.

    None if the smaller sizes do not determine a law.
    """
    largest = max(point.parameters for point in points)
    try:
        law = LossLaw.fit([point for point in points if point.parameters < largest])
    except ValueError:
        return None
    longest = max((point for point in points if point.parameters == largest), key=lambda point: point.tokens)
    return law.loss(longest.parameters, longest.tokens) / longest.loss - 1


def seed_deviation(by_seed: Sequence[Sequence[float]]) -> float:
    """Return the standard deviation of log loss between the seeds of each group; `SEED_DEVIATION` for one seed."""
    variances = [
        float(np.var(np.log(losses), ddof=1))
        for losses in by_seed
        if len(losses) > 1 and all(map(math.isfinite, losses))
    ]
    return math.sqrt(float(np.mean(variances))) if variances else SEED_DEVIATION


def _require_spread(points: Sequence[LossPoint]) -> None:
    sizes, lengths = {point.parameters for point in points}, {point.tokens for point in points}
    if len(points) < 6 or len(sizes) < 2 or len(lengths) < 3:
        raise ValueError(
            f"the law of the loss needs two sizes and three lengths, six runs at least; there are {len(points)} runs "
            f"of {len(sizes)} sizes and {len(lengths)} lengths"
        )


def _fit(points: Sequence[LossPoint], starts: Sequence[tuple[float, float]]) -> LossLaw:
    with extra_required("the law of the loss", "scipy", "plot"):
        from scipy import optimize
    n, d, loss = np.array([(point.parameters, point.tokens, point.loss) for point in points]).T
    middle = (math.exp(np.log(n).mean()), math.exp(np.log(d).mean()))
    log_n, log_d, log_loss = np.log(n / middle[0]), np.log(d / middle[1]), np.log(loss)

    def residuals(x: Any) -> Any:
        e, a, b, alpha, beta = x
        return np.log(e + a * np.exp(-alpha * log_n) + b * np.exp(-beta * log_d)) - log_loss

    least = loss.min()
    fits = [
        optimize.least_squares(
            residuals,
            [0.5 * least, 0.25 * least, 0.25 * least, alpha, beta],
            bounds=([0.0] * 5, [least, 10 * least, 10 * least, MAX_EXPONENT, MAX_EXPONENT]),
            loss="huber",
            f_scale=HUBER,
            x_scale=[least, least, least, 1.0, 1.0],
        )
        for alpha, beta in starts
    ]
    e, a, b, alpha, beta = min(fits, key=lambda fit: float(fit.cost)).x
    return LossLaw(float(e), float(a), float(alpha), float(b), float(beta), middle)


@dataclass(frozen=True)
class PowerLaw:
    """y = scale * product of (x_i / middle_i)^exponent_i, of the variables whose exponent is known not to be zero."""

    fit: Regression
    full: Regression
    """With all variables: an exponent that is not known may be another number than zero."""
    names: tuple[str, ...]
    """The variables that were kept."""
    middle: dict[str, float]
    """The geometric means over the points, of all variables of `full`."""
    points: int

    @classmethod
    def of(cls, y: Sequence[float], variables: dict[str, Sequence[float]]) -> PowerLaw:
        """Fit the logarithms by least squares; drop variables whose exponent has an interval that includes zero.

        A variable with one value, or without a degree of freedom left for it, is not used. Raises ValueError without
        scipy.
        """
        logs = {name: np.log(values) for name, values in variables.items() if len(set(values)) > 1}
        while logs and len(y) <= len(logs) + 1:
            logs.popitem()
        kept = list(logs)
        full = fit = _regress(y, [logs[name] for name in kept])
        while kept:
            exponents = {name: fit.estimate(number) for number, name in enumerate(kept, 1)}
            unknown = {name: each for name, each in exponents.items() if each.low <= 0 <= each.high}
            if not unknown:
                break
            widest = max(unknown, key=lambda name: unknown[name].high - unknown[name].low)
            kept = [name for name in kept if name != widest]
            fit = _regress(y, [logs[name] for name in kept])
        middle = {name: float(math.exp(values.mean())) for name, values in logs.items()}
        return cls(fit, full, tuple(kept), middle, len(y))

    @property
    def dropped(self) -> list[str]:
        """The variables whose exponent is not known to differ from zero."""
        return [name for name in self.middle if name not in self.names]

    def value(self, **variables: float) -> float:
        logs = [math.log(variables[name] / self.middle[name]) for name in self.names]
        return float(math.exp(self.fit.coefficients @ [1.0, *logs]))

    def at(self, **variables: float) -> Estimate:
        """Return y with its 95 % interval, which covers the fit with all variables too; from one point all numbers."""
        logs = {name: math.log(variables[name] / middle) for name, middle in self.middle.items()}
        if self.fit.degrees_of_freedom < 1:
            return Estimate(self.value(**variables), 0.0, math.inf)
        reduced = self.fit.at([1.0, *(logs[name] for name in self.names)]).exp()
        full = self.full.at([1.0, *logs.values()]).exp()
        return Estimate(reduced.value, min(reduced.low, full.low), max(reduced.high, full.high))

    def __str__(self) -> str:
        text = f"{math.exp(self.fit.coefficients[0]):.3g}"
        for number, name in enumerate(self.names, 1):
            text += f" ({name} / {self.middle[name]:.3g})^{self.fit.coefficients[number]:.3g}"
        return text


def _regress(y: Sequence[float], logs: Sequence[Any]) -> Regression:
    columns = [np.ones(len(y)), *(values - values.mean() for values in logs)]
    return Regression.fit(np.stack(columns, axis=1), np.log(y))
