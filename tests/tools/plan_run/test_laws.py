"""Laws are found again from points that follow them, and intervals contain what was not seen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tools.plan_run.laws import SEED_DEVIATION, LossLaw, LossPoint, PowerLaw, error_on_largest, seed_deviation

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
    assert not law.undetermined(points())
    assert abs(error_on_largest(points())) < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("shared", [0.0, 0.004])
def test_intervals_contain_the_loss_of_a_larger_model_in_most_repetitions(shared):
    """Nominally 95 %. With `shared`, all runs of a size have the same error, as those of one seed have."""
    contained = 0
    for seed in range(6):
        random = np.random.default_rng(seed)
        errors = {n: shared * random.standard_normal() for n in SIZES}
        noisy = [
            LossPoint(p.parameters, p.tokens, p.loss * np.exp(errors[p.parameters]), max(shared, 1e-4))
            for p in points(0.001, seed)
        ]
        found = LossLaw.fit(noisy).interval(noisy, 2e7, 8e6)
        contained += found.low <= loss(2e7, 8e6) <= found.high
        assert found.low <= found.value <= found.high
    assert contained >= 5


@pytest.mark.slow
def test_the_deviation_between_seeds_is_measured_or_assumed():
    assert seed_deviation([[2.0], [3.0]]) == SEED_DEVIATION
    assert seed_deviation([[2.0 * np.exp(0.01), 2.0 * np.exp(-0.01)], [3.0]]) == pytest.approx(0.01 * 2**0.5)
    law, one = LossLaw.fit(points(0.001)), points(0.001)
    two = [replace(point, seed_deviation=0.02) for point in one]
    narrow, wide = (law.interval(each, 4e6, 4e6) for each in (one, two))
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_what_the_points_do_not_determine_is_named():
    random = np.random.default_rng(0)
    flat = [LossPoint(n, d, E + B / d**BETA + 0.002 * random.standard_normal()) for n in SIZES for d in LENGTHS]
    assert "alpha" in LossLaw.fit(flat).undetermined(flat)
    through_zero = [LossPoint(n, d, A / n**ALPHA + B / d**BETA) for n in SIZES for d in LENGTHS]
    assert "e" in LossLaw.fit(through_zero).undetermined(through_zero)
    with pytest.raises(ValueError, match="two sizes and three lengths"):
        LossLaw.fit([LossPoint(1e6, d, loss(1e6, d)) for d in LENGTHS])
    assert error_on_largest([point for point in points() if point.parameters in SIZES[:2]]) is None


def test_a_power_law_keeps_the_variable_that_matters_and_drops_the_other():
    random = np.random.default_rng(1)
    n, d = zip(*((n, d) for n in SIZES for d in LENGTHS), strict=True)
    y = [3.0 * (each / 1e6) ** 0.5 * np.exp(0.03 * random.standard_normal()) for each in d]
    law = PowerLaw.of(y, {"D": d, "N": n})
    assert (law.names, law.dropped) == (("D",), ["N"])
    found = law.at(D=1e8, N=1e6)
    assert found.low < 30 < found.high and found.high / found.low < 1.5
    far = law.at(D=1e8, N=1e9)
    assert far.value == found.value and far.high / far.low > found.high / found.low, "its exponent is not known to be 0"
    assert "D / " in str(law) and "N / " not in str(law)


def test_a_constant_is_a_power_law_and_one_point_is_not_certain():
    law = PowerLaw.of([2.0, 2.2, 1.9, 2.1], {"D": [1e6, 2e6, 3e6, 4e6]})
    assert law.names == () and law.at(D=1e12).value == pytest.approx(2.046, abs=0.01)
    alone = PowerLaw.of([2.0], {"D": [1e6]}).at(D=1e9)
    assert (alone.value, alone.low, alone.high) == (pytest.approx(2.0), 0.0, float("inf"))
