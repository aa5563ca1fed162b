"""The best learning rate is exact on exact data, and intervals have their nominal coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tools.sweep.optimum import Optimum, Regression, find_optimum

pytest.importorskip("scipy", reason="needs the [plot] extra")
pytestmark = pytest.mark.quick

LRS = [2.0**power for power in range(-12, -3)]


def parabola(best: float, curvature: float = 0.1) -> dict[float, list[float]]:
    return {lr: [4 + curvature * math.log(lr / best) ** 2] for lr in LRS}


@pytest.mark.parametrize("best", [0.0021, 0.01, 2**-7.5])
def test_the_vertex_of_a_parabola_is_found_exactly(best):
    found = find_optimum(parabola(best))
    assert isinstance(found, Optimum)
    assert found.lr == pytest.approx(best, rel=1e-9)
    assert found.loss == pytest.approx(4, abs=1e-9)


@pytest.mark.parametrize(
    ("losses", "why"),
    [
        ({1e-3: [1.0], 2e-3: [2.0], 4e-3: [3.0]}, "below the grid"),
        ({1e-3: [3.0], 2e-3: [2.0], 4e-3: [1.0]}, "above the grid"),
        ({1e-3: [3.0], 2e-3: [2.0], 4e-3: [1.0, math.inf]}, "next to a failed run"),
        ({1e-3: [math.inf], 2e-3: [2.0], 4e-3: [3.0]}, "next to a failed run"),
        ({1e-3: [math.inf]}, "no minimum"),
        ({1e-3: [3.0]}, "no minimum"),
    ],
)
def test_a_best_lr_without_neighbors_is_not_an_optimum(losses, why):
    assert find_optimum(losses) == why


def test_a_failed_run_further_up_does_not_matter():
    losses = {**parabola(0.004), LRS[-1]: [math.inf]}
    found = find_optimum(losses)
    assert isinstance(found, Optimum) and found.lr == pytest.approx(0.004, rel=1e-9)


@pytest.mark.parametrize(("freedom", "published"), [(1, 12.706), (2, 4.303), (10, 2.228), (100, 1.984)])
def test_an_interval_is_that_of_the_published_tables_of_students_t(freedom, published):
    found = Regression(np.array([3.0]), np.array([[4.0]]), freedom).estimate(0)
    assert (found.low, found.high) == pytest.approx((3 - 2 * published, 3 + 2 * published), abs=2e-3)


def test_the_error_of_a_vertex_has_its_nominal_coverage():
    """Five learning rates and three seeds: the window of three learning rates has 6 degrees of freedom."""
    generator, held, trials = np.random.default_rng(0), 0, 500
    for _ in range(trials):
        losses = {lr: list(each + generator.normal(0, 0.005, 3)) for lr, each in parabola(0.0085).items()}
        found = find_optimum(losses)
        assert isinstance(found, Optimum) and found.error is not None
        held += abs(found.log_lr - math.log(0.0085)) <= 2.447 * found.error  # t of 6 degrees of freedom
    assert 0.92 <= held / trials <= 0.98  # 0.95, with three standard deviations of 500 trials
