"""Laws are found again from points that follow them, and intervals contain what was not seen."""

from __future__ import annotations

import numpy as np
import pytest

from tools.plan_run.laws import LossLaw, LossPoint, PowerLaw, error_on_largest

pytest.importorskip("scipy", reason="needs the [plot] extra")
pytestmark = pytest.mark.quick

SIZES, LENGTHS = (2e5, 6e5, 1.5e6, 4e6), (5e5, 1e6, 2e6, 4e6)
E, A, ALPHA, B, BETA = 1.8, 20.0, 0.34, 60.0, 0.28


def loss(n: float, d: float) -> float:
    return E + A / n**ALPHA + B / d**BETA


def points(noise: float = 0.0, seed: int = 0) -> list[LossPoint]:
    random = np.random.default_rng(seed)
    return [LossPoint(n, d, loss(n, d) * (1 + noise * random.standard_normal())) for n in SIZES for d in LENGTHS]


def test_an_exact_law_predicts_ten_times_the_size_and_the_tokens():
    law = LossLaw.fit(points())
    assert law.loss(4e7, 4e7) == pytest.approx(loss(4e7, 4e7), rel=2e-3)
    assert law.loss(4e6, 4e6) == pytest.approx(loss(4e6, 4e6), rel=1e-5)
    assert not law.at_limit
    assert abs(error_on_largest(points())) < 2e-3


def test_intervals_contain_the_loss_at_ten_times_the_tokens_in_most_repetitions():
    """Nominally 95 %, from residuals of 11 degrees of freedom."""
    contained = 0
    for seed in range(6):
        noisy = points(0.002, seed)
        found = LossLaw.fit(noisy).interval(noisy, 4e6, 4e7)
        contained += found.low <= loss(4e6, 4e7) <= found.high
        assert found.low <= found.value <= found.high
    assert contained >= 5


def test_what_the_points_do_not_determine_is_named():
    flat = [LossPoint(n, d, B / d**BETA) for n in SIZES for d in LENGTHS]
    assert LossLaw.fit(flat).at_limit
    with pytest.raises(ValueError, match="two sizes and three lengths"):
        LossLaw.fit([LossPoint(1e6, d, loss(1e6, d)) for d in LENGTHS])
    assert error_on_largest([point for point in points() if point.parameters in SIZES[:2]]) is None


def test_a_power_law_keeps_the_variable_that_matters_and_drops_the_other():
    random = np.random.default_rng(1)
    n, d = zip(*((n, d) for n in SIZES for d in LENGTHS), strict=True)
    y = [3.0 * (each / 1e6) ** 0.5 * np.exp(0.03 * random.standard_normal()) for each in d]
    law = PowerLaw.of(y, {"D": d, "N": n})
    assert law.names == ("D",)
    found = law.at(D=1e8, N=1e9)
    assert found.low < 30 < found.high and found.high / found.low < 1.5
    assert "D / " in str(law) and "N / " not in str(law)


def test_a_constant_is_a_power_law_and_one_point_is_not_certain():
    law = PowerLaw.of([2.0, 2.2, 1.9, 2.1], {"D": [1e6, 2e6, 3e6, 4e6]})
    assert law.names == () and law.at(D=1e12).value == pytest.approx(2.046, abs=0.01)
    alone = PowerLaw.of([2.0], {"D": [1e6]}).at(D=1e9)
    assert (alone.value, alone.low, alone.high) == (pytest.approx(2.0), 0.0, float("inf"))
