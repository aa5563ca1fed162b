"""Estimates smoothed over steps."""

from __future__ import annotations

import copy
import json
import math

import pytest

from components.gradient_noise.moments import GradientMoments, GradientNoise
from components.gradient_noise.smoothing import NoiseEstimator


def test_smoothing_depends_on_samples_and_not_on_steps():
    """A constant measurement is kept as it is; a step of 64 samples moves the average like eight steps of 8."""
    before, after, large = (estimates(*each) for each in ((2.0, 1.0, 8), (12.0, 1.5, 8), (12.0, 1.5, 64)))
    coarse, fine = NoiseEstimator(100), NoiseEstimator(100)
    for smoothed in (coarse, fine):
        first = smoothed.update(8, {"l2": before})
        assert (first.grad_cov_trace, first.grad_sq_norm) == pytest.approx((before.grad_cov_trace, before.grad_sq_norm))
    many = [fine.update(8 + 8 * number, {"l2": after}) for number in range(1, 9)][-1]
    once = coarse.update(8 + 64, {"l2": large})
    assert (once.grad_cov_trace, once.grad_sq_norm) == pytest.approx(
        (many.grad_cov_trace, many.grad_sq_norm), rel=1e-12
    )
    kept = math.exp(-64 / 100)
    weight = kept * (1 - math.exp(-0.08))
    expected = (weight * before.grad_cov_trace + (1 - kept) * after.grad_cov_trace) / (weight + 1 - kept)
    assert once.grad_cov_trace == pytest.approx(expected, rel=1e-12)


def estimates(noise: float, signal: float, samples: int) -> GradientMoments:
    """A step of two micro-batches with these estimates."""
    mean_grad_sq_norm = signal + noise / samples
    return GradientMoments(2, samples // 2, noise / (samples // 2) + 2 * mean_grad_sq_norm, mean_grad_sq_norm)


@pytest.mark.parametrize("earlier", [False, True])
def test_the_first_measurement_after_unmeasured_steps_has_ordinary_weight(earlier):
    """The first measurement, an outlier, must not outweigh the next ten."""
    smoothed = NoiseEstimator(100)
    if earlier:
        smoothed.update(8, {"l2": estimates(7.0, 1.0, 8)})
    assert smoothed.update(10_000, {"l2": estimates(90.0, 1.0, 8)}).grad_cov_trace == pytest.approx(90.0)
    later = [smoothed.update(10_000 + 8 * number, {"l2": estimates(2.0, 1.0, 8)}) for number in range(1, 11)][-1]
    kept = math.exp(-0.08)
    weights = [kept**age for age in range(11)]
    assert later.grad_cov_trace == pytest.approx(2.0 + 88.0 * weights[-1] / sum(weights), rel=1e-9)


def test_measuring_every_other_step_weighs_each_equally():
    smoothed, kept = NoiseEstimator(100), math.exp(-0.16)
    found = [smoothed.update(16 * number, {"l2": estimates(float(number), 1.0, 8)}) for number in (1, 2, 3)][-1]
    assert found.grad_cov_trace == pytest.approx((3 + 2 * kept + kept**2) / (1 + kept + kept**2), rel=1e-12)


def test_a_step_without_information_is_ignored():
    smoothed = NoiseEstimator(100)
    smoothed.update(8, {"l2": GradientMoments(4, 2, 10.0, 2.0)})
    state = smoothed.state_dict()
    for useless in (
        GradientMoments(1, 8, 2.0, 2.0), GradientMoments(4, 2, math.nan, 2.0), GradientMoments(4, 2, 1.0, math.inf)
    ):  # fmt: skip
        assert smoothed.update(16, {"l2": useless}) is None
        assert smoothed.state_dict() == state


def test_a_restored_average_continues_unchanged():
    steps = [GradientMoments(4, 2, 8.0 + number, 1.0 + number / 9) for number in range(6)]
    whole, first, second = NoiseEstimator(30), NoiseEstimator(30), NoiseEstimator(30)
    expected = [whole.update(8 * (number + 1), {"l2": step}) for number, step in enumerate(steps)]
    for number, step in enumerate(steps[:3]):
        first.update(8 * (number + 1), {"l2": step})
    second.load_state_dict(first.state_dict())
    assert [second.update(8 * (number + 4), {"l2": step}) for number, step in enumerate(steps[3:])] == expected[3:]


def test_a_signal_that_is_not_positive_has_no_noise_scale():
    noise = NoiseEstimator(10).update(8, {"l2": GradientMoments(4, 2, 40.0, 1.0)})
    assert noise.grad_sq_norm < 0
    assert noise.noise_scale is None and noise.noise_scale_over_batch is None


def test_noise_scale_over_batch_is_in_units_of_the_batch():
    estimate = GradientMoments(4, 2, 10.0, 2.0)
    noise = NoiseEstimator(10).update(8, {"l2": estimate})
    assert noise.noise_scale == pytest.approx(estimate.grad_cov_trace / estimate.grad_sq_norm)
    assert noise.noise_scale_over_batch == pytest.approx(estimate.grad_cov_trace / estimate.grad_sq_norm / 8)


def test_the_averages_in_the_norm_of_adam_are_separate_and_are_restored():
    first, second = NoiseEstimator(100), NoiseEstimator(100)
    euclidean = [estimates(7.0, 1.0, 8), estimates(9.0, 1.0, 8)]
    in_adam = [estimates(3.0, 2.0, 8), estimates(5.0, 2.0, 8)]
    assert first.update(8, {"l2": estimates(1.0, 1.0, 8)}).adam is None, "before the first step"
    for step, (l2, adam) in enumerate(zip(euclidean, in_adam, strict=True), 2):
        found = first.update(8 * step, {"l2": l2, "adam": adam})
        alone = second.update(8 * step, {"l2": adam})
        assert found.in_norm("adam").moments == adam
        assert found.in_norm("adam").noise_scale == pytest.approx(alone.noise_scale)
        assert found.in_norm("l2").moments == l2
        restored = NoiseEstimator(100)
        restored.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert GradientNoise.from_state_dict(json.loads(json.dumps(found.state_dict()))) == found
        following = {"l2": estimates(2.0, 1.0, 8), "adam": estimates(1.0, 1.0, 8)}
        assert restored.update(8 * step + 8, following) == copy.deepcopy(first).update(8 * step + 8, following)


def test_a_rollback_to_a_step_before_the_first_measurement_in_the_norm_of_adam_forgets_it():
    smoothed, fresh = NoiseEstimator(100), NoiseEstimator(100)
    for each in (smoothed, fresh):
        each.update(8, {"l2": estimates(1.0, 1.0, 8)})
    before = json.loads(json.dumps(smoothed.state_dict()))
    smoothed.update(16, {"l2": estimates(2.0, 1.0, 8), "adam": estimates(90.0, 1.0, 8)})
    smoothed.load_state_dict(before)
    again = {"l2": estimates(2.0, 1.0, 8), "adam": estimates(3.0, 1.0, 8)}
    assert smoothed.update(16, again) == fresh.update(16, again)
