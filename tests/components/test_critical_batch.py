"""The smoothing and the choice of k*, against closed forms and made-up curves."""

from __future__ import annotations

import math

import pytest

from components.critical_batch import largest_factor, smooth_losses

pytestmark = pytest.mark.quick


def test_the_average_weighs_each_step_by_its_tokens():
    losses, batch, scale = [5.0, 4.0, 7.0, 3.5], 24, 60.0
    for count in range(1, len(losses) + 1):
        end = count * batch
        weights = [
            math.exp(-(end - (i + 1) * batch) / scale) - math.exp(-(end - i * batch) / scale) for i in range(count)
        ]
        wanted = sum(w * loss for w, loss in zip(weights, losses, strict=False)) / sum(weights)
        assert smooth_losses(losses, [batch] * 4, scale)[count - 1] == pytest.approx(wanted, rel=1e-12)


def test_a_loss_that_is_not_finite_leaves_the_average_as_it_was():
    found = smooth_losses([math.nan, 2.0, math.inf, 3.0], [8] * 4, 20.0)
    assert math.isnan(found[0])
    assert found[1] == found[2] == pytest.approx(2.0)
    assert found[3] == pytest.approx(smooth_losses([2.0, 3.0], [8] * 2, 20.0)[-1], rel=1e-12)


def test_the_average_of_a_constant_is_the_constant():
    assert smooth_losses([2.5] * 4, [8] * 4, 100.0) == pytest.approx([2.5] * 4)


def test_the_same_curve_in_steps_twice_as_long_has_the_same_average():
    pairs = [6.0, 5.0, 4.5, 4.2]
    fine = smooth_losses([loss for loss in pairs for _ in range(2)], [10] * 8, 45.0)
    assert smooth_losses(pairs, [20] * 4, 45.0) == pytest.approx(fine[1::2], rel=1e-12)


@pytest.mark.parametrize(
    ("losses", "wanted"),
    [
        ([3.0, 3.001, 3.005, 3.2], 4),
        ([3.0, 3.2, 3.0, 3.0], 1),  # what comes back by chance does not count
        ([3.0, 3.005, 3.02, 3.005], 2),
        ([3.0, 2.9, 2.8, 2.7], 8),  # better is not too large
        ([3.0, 3.0, math.nan, 3.0], 2),
        ([3.0, 3.0, -math.inf, 3.0], 2),
        ([3.0, 3.02, 3.04, 3.06], 1),
    ],
)
def test_the_largest_factor_within_and_all_smaller_ones_too(losses, wanted):
    assert largest_factor([1, 2, 4, 8], losses, 0.01) == wanted
