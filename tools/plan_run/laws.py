"""The laws of a plan: the loss of a size and a length, and power laws of the learning rate and of the noise scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.sweep.lr_law import CONFIDENCE, Estimate, Regression

STARTS = tuple((alpha, beta) for alpha in (0.2, 0.5, 1.0) for beta in (0.2, 0.5, 1.0))
"""Exponents from which the fit starts."""
HUBER = 1e-3
"""Residuals of log loss beyond this count less, as in arXiv 2203.15556, appendix D.2."""
BOOTSTRAP_FITS = 100
MAX_EXPONENT = 2.0


@dataclass(frozen=True)
class LossPoint:
    """The loss of one size and length, at its best learning rate."""

    parameters: float
    tokens: float
    loss: float


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

    @property
    def at_limit(self) -> str:
        """The parameters that ended at a limit of the fit, so the points do not determine them; empty if none did."""
        limits = {"e": self.e < 0.01 * (self.a + self.b), "alpha": self.alpha > 0.99 * MAX_EXPONENT}
        limits |= {"beta": self.beta > 0.99 * MAX_EXPONENT, "alpha ": self.a <= 0, "beta ": self.b <= 0}
        return " and ".join(name.strip() for name, reached in limits.items() if reached)

    def interval(self, points: Sequence[LossPoint], parameters: float, tokens: float) -> Estimate:
        """Return the predicted loss with its 95 % interval: fits of resampled residuals, and a residual more.

        It holds if the law does. Residuals are enlarged by the points over the degrees of freedom.
        """
        fitted = np.log([self.loss(each.parameters, each.tokens) for each in points])
        residuals = np.log([each.loss for each in points]) - fitted
        residuals *= math.sqrt(len(points) / max(1, len(points) - 5))
        random, found = np.random.default_rng(0), []
        for _ in range(BOOTSTRAP_FITS):
            losses = np.exp(fitted + random.choice(residuals, len(points)))
            drawn = [LossPoint(p.parameters, p.tokens, loss) for p, loss in zip(points, losses, strict=True)]
            law = _fit(drawn, [(self.alpha, self.beta)])
            found.append(law.loss(parameters, tokens) * math.exp(random.choice(residuals)))
        low, high = np.quantile(found, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        value = self.loss(parameters, tokens)
        return Estimate(value, min(value, float(low)), max(value, float(high)))

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


def _require_spread(points: Sequence[LossPoint]) -> None:
    sizes, lengths = {point.parameters for point in points}, {point.tokens for point in points}
    if len(points) < 6 or len(sizes) < 2 or len(lengths) < 3:
        raise ValueError(
            f"the law of the loss needs two sizes and three lengths, six runs at least; there are {len(points)} runs "
            f"of {len(sizes)} sizes and {len(lengths)} lengths"
        )


def _fit(points: Sequence[LossPoint], starts: Sequence[tuple[float, float]]) -> LossLaw:
    try:
        from scipy import optimize
    except ModuleNotFoundError:
        raise ValueError("the law of the loss needs scipy: pip install -e '.[plot]'") from None
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
    names: tuple[str, ...]
    """The variables that were kept."""
    middle: tuple[float, ...]
    """Their geometric means over the points."""
    points: int

    @classmethod
    def of(cls, y: Sequence[float], variables: dict[str, Sequence[float]]) -> PowerLaw:
        """Fit the logarithms by least squares; drop variables whose exponent has an interval that includes zero.

        A variable with one value, or without a degree of freedom left for it, is dropped too. Raises ValueError
        without scipy.
        """
        kept = {name: np.log(values) for name, values in variables.items() if len(set(values)) > 1}
        while True:
            while kept and len(y) <= len(kept) + 1:
                kept.popitem()
            columns = [np.ones(len(y)), *(values - values.mean() for values in kept.values())]
            fit = Regression.fit(np.stack(columns, axis=1), np.log(y))
            exponents = {name: fit.estimate(number) for number, name in enumerate(kept, 1)}
            unknown = {name: each for name, each in exponents.items() if each.low <= 0 <= each.high}
            if not unknown:
                break
            del kept[max(unknown, key=lambda name: abs(unknown[name].high - unknown[name].low))]
        middle = tuple(float(math.exp(values.mean())) for values in kept.values())
        return cls(fit, tuple(kept), middle, len(y))

    def at(self, **variables: float) -> Estimate:
        """Return y with its 95 % interval; without one of a single point, whose interval is all numbers."""
        logs = [math.log(variables[name] / middle) for name, middle in zip(self.names, self.middle, strict=True)]
        if self.fit.degrees_of_freedom < 1:
            value = math.exp(self.fit.coefficients[0])
            return Estimate(value, 0.0, math.inf)
        return self.fit.at([1.0, *logs]).exp()

    def __str__(self) -> str:
        text = f"{math.exp(self.fit.coefficients[0]):.3g}"
        for number, (name, middle) in enumerate(zip(self.names, self.middle, strict=True), 1):
            text += f" ({name} / {middle:.3g})^{self.fit.coefficients[number]:.3g}"
        return text
