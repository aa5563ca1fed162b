"""The law of the best learning rates is exact on exact data, and its intervals have their nominal coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.lr_transfer.law import OptimumPoint, fit_law
from tools.sweep.optimum import Optimum, find_optimum

pytest.importorskip("scipy", reason="needs the [plot] extra")
pytestmark = pytest.mark.quick

GROUPS = [(tokens, beta) for tokens in (3e5, 1.2e6, 5e6) for beta in (0.25, 1.0)]
A, B = 4.6, -0.51


def best_lr(tokens: float, beta: float) -> float:
    return beta * A * tokens**B


def test_a_law_without_noise_is_found_exactly():
    law = fit_law([OptimumPoint(tokens, beta, best_lr(tokens, beta)) for tokens, beta in GROUPS])
    assert (law.a.value, law.b.value) == (pytest.approx(A), pytest.approx(B))
    assert law.gamma.value == pytest.approx(A * law.middle**B)
    assert law.batch_exponent is not None and law.batch_exponent.value == pytest.approx(1)


def test_an_lr_proportional_to_the_root_of_the_batch_is_found():
    law = fit_law([OptimumPoint(tokens, beta, math.sqrt(beta) * tokens**B) for tokens, beta in GROUPS])
    assert law.batch_exponent is not None and law.batch_exponent.value == pytest.approx(0.5)


@pytest.mark.slow
def test_intervals_of_the_law_have_their_nominal_coverage():
    """Losses have noise and a valley that is steeper on the high side; learning rates are a factor of two apart.

    The bias of a steep side moves a, and not b: it is the same in every group. So b and the exponent of the batch are
    judged; a and gamma are with a symmetric valley.
    """
    trials = 300
    held = {"a": 0, "b": 0, "gamma": 0, "batch": 0, "b, steep": 0}
    generator = np.random.default_rng(1)
    for _ in range(trials):
        for steepness in (0.0, 0.02):
            found = []
            for tokens, beta in GROUPS:
                best = best_lr(tokens, beta)
                # the optimum of each group lies elsewhere between the learning rates
                lrs = best * 2.0 ** (np.arange(-4, 5) + generator.uniform(-0.5, 0.5))
                x = np.log(lrs / best)
                y = 4 + 0.1 * x**2 + steepness * x**3 + generator.normal(0, 0.005, len(x))
                group = find_optimum({lr: [loss] for lr, loss in zip(lrs, y, strict=True)})
                assert isinstance(group, Optimum)
                found.append(OptimumPoint(tokens, beta, group.lr))
            law = fit_law(found)
            assert law.batch_exponent is not None
            middle = math.exp(np.mean([math.log(tokens) for tokens, _ in GROUPS]))
            if steepness:
                held["b, steep"] += law.b.low <= B <= law.b.high
                continue
            held["a"] += law.a.low <= A <= law.a.high
            held["b"] += law.b.low <= B <= law.b.high
            held["gamma"] += law.gamma.low <= A * middle**B <= law.gamma.high
            held["batch"] += law.batch_exponent.low <= 1 <= law.batch_exponent.high
    shares = {name: count / trials for name, count in held.items()}
    # 0.95, with three standard deviations of 300 trials, and a margin for an error that is not quite normal
    assert all(0.90 <= share <= 0.99 for share in shares.values()), shares


@pytest.mark.parametrize(
    "groups", [GROUPS[:2], [(3e5, 1.0)] * 5, [(300_032, 0.25), (303_104, 1.0), (300_032, 4.0), (303_104, 0.3)]]
)
def test_too_few_groups_have_no_law(groups):
    with pytest.raises(ValueError, match="three groups or more"):
        fit_law([OptimumPoint(tokens, beta, best_lr(tokens, beta)) for tokens, beta in groups])


def test_a_poorly_determined_law_has_wide_intervals_and_no_error():
    law = fit_law([OptimumPoint(3e5, 1.0, 1e-9), OptimumPoint(5e5, 1.0, 1e-2), OptimumPoint(5e5, 1.0, 1e-9)])
    assert (law.a.low, law.a.high) == (0, math.inf)


def test_collinear_lengths_and_batches_give_no_batch_exponent():
    points = [OptimumPoint(t, t / 1e6, best_lr(t, t / 1e6)) for t in (1e6, 2e6, 4e6, 8e6)]
    assert fit_law(points).batch_exponent is None
