"""The norm test against its definition on explicit gradients, and against theory."""

from __future__ import annotations

import math

import numpy as np
import pytest

from components.batch import Adaptive, NoiseScale, NormTest
from tests.components.batch.moments import Moments, built, clock, of_gradients

pytestmark = pytest.mark.quick

ANY = {"initial_size": 1, "max_size": 10**9}


def paper(**keys) -> NormTest:
    return NormTest(estimator="paper", **{**ANY, **keys})


def after(config: Adaptive, noise: Moments) -> int:
    policy = built(config)
    policy.observe(clock(1000), noise)
    return policy.next_batch_size(clock(1000))


@pytest.mark.parametrize("groups", [2, 4, 16])
def test_the_papers_value_is_equation_5_of_explicit_gradients(groups):
    eta = 0.3
    gradients = np.random.default_rng(groups).normal(0.1, 1.0, (groups, 1000))
    mean = gradients.mean(axis=0)
    by_hand = np.mean([np.sum((g - mean) ** 2) for g in gradients]) / (eta**2 * np.sum(mean**2))
    noise = of_gradients(gradients, micro_batch_size=2)
    assert paper(eta=eta).target(noise) == pytest.approx(by_hand, rel=1e-12)
    assert paper(eta=eta, workers=groups).target(noise) == paper(eta=eta).target(noise)


def test_the_papers_value_for_other_workers_is_on_average_that_of_other_groups():
    """From 16 groups of 2 samples, the mean of ||g_j - g||^2 that 4 workers of 8 samples each would have found."""
    random = np.random.default_rng(1)
    samples = random.normal(0.2, 1.0, (4000, 32, 10))
    wanted, found = [], []
    for batch in samples:
        workers = batch.reshape(4, 8, 10).mean(axis=1)
        micro = batch.reshape(16, 2, 10).mean(axis=1)
        square = np.sum(batch.mean(axis=0) ** 2)
        wanted.append(paper(eta=1.0).target(of_gradients(workers, 8)) * square)
        found.append(paper(eta=1.0, workers=4).target(of_gradients(micro, 2)) * square)
    difference = np.array(found) - np.array(wanted)
    assert abs(difference.mean()) < 3 * difference.std() / math.sqrt(len(samples))
    assert 0 < 3 * difference.std() / math.sqrt(len(samples)) < 0.03 * np.mean(wanted), "a test that can fail"


def test_it_grows_to_the_value_rounded_up_only_if_that_exceeds_the_batch():
    # spread = 80 - 4 * 10 = 40, T = (40 / 4) / (0.5**2 * 10) = 4 ... on a batch of 4 samples
    noise = Moments(num_micro_batches=4, micro_batch_size=1, sum_micro_grad_sq_norms=80.0, mean_grad_sq_norm=10.0)
    assert paper(eta=0.5).target(noise) == 4.0
    assert after(paper(eta=0.5, initial_size=4), noise) == 4, "T = b passes"
    assert after(paper(eta=0.49, initial_size=4), noise) == 5
    assert after(paper(eta=0.49, initial_size=4, multiple_of=4, max_size=400), noise) == 8
    smaller = Moments(num_micro_batches=4, micro_batch_size=8, sum_micro_grad_sq_norms=80.0, mean_grad_sq_norm=10.0)
    assert after(paper(eta=0.49, initial_size=32), smaller) == 32, "never shrinks"


def test_the_paper_reads_no_smoothed_moment():
    noise = Moments(num_micro_batches=4, sum_micro_grad_sq_norms=80.0, mean_grad_sq_norm=10.0)
    other = Moments(
        num_micro_batches=4, sum_micro_grad_sq_norms=80.0, mean_grad_sq_norm=10.0, grad_cov_trace=1e9, grad_sq_norm=-5.0
    )
    assert paper(eta=0.1).target(noise) == paper(eta=0.1).target(other)


def test_the_papers_value_is_biased_and_capped_by_the_number_of_workers():
    """E T is about (J - 1) B / (eta^2 (b + B)), with B = tr(Sigma) / |G|^2 the noise scale.

    The spread of J workers of b / J samples is on average S (J - 1) / b with S = tr(Sigma), and ||g||^2 is on average
    |G|^2 + S / b: the ratio is (J - 1) (S / b) / (|G|^2 + S / b), over eta^2. It depends on J, where the error of g
    does not, and however large the noise it is never above (J - 1) / eta^2: J = 4 and eta = 0.15 ask for 133 samples
    at most.
    """
    eta, parameters = 0.15, 400
    random = np.random.default_rng(0)
    for workers in (2, 4, 16):
        for batch, scale in ((16, 4.0), (64, 64.0), (16, 400.0)):
            mean = np.full(parameters, 1 / math.sqrt(parameters * scale))  # |G|^2 = 1 / scale; tr(Sigma) = 1
            noise = random.normal(0, math.sqrt(1 / parameters), (500, workers, parameters))
            gradients = mean + noise / math.sqrt(batch / workers)
            values = np.array([paper(eta=eta).target(of_gradients(g, batch // workers)) for g in gradients])
            expected = (workers - 1) * scale / (eta**2 * (batch + scale))
            assert values.mean() == pytest.approx(expected, rel=0.05)
            cap = (workers - 1) / eta**2
            assert expected < cap
    pure_noise = of_gradients(random.normal(0, 1, (4, 10**5)), 1)
    assert paper(eta=eta).target(pure_noise) == pytest.approx(3 / eta**2, rel=0.05)  # 133.3


def test_the_unbiased_estimates_are_those_of_a_known_distribution():
    """tr(Sigma), |G|^2 and the target, each within three standard errors of what it estimates.

    The target is of moments smoothed over many steps: numerator and denominator are averaged, then divided.
    """
    random = np.random.default_rng(2)
    deviations = np.linspace(0.2, 2.0, 12)
    mean = np.linspace(-0.5, 0.7, 12)
    trace, square = float((deviations**2).sum()), float((mean**2).sum())
    draws, groups, size = 20_000, 8, 3
    gradients = mean + deviations * random.normal(size=(draws, groups, size, 12))
    steps = [of_gradients(g, size) for g in gradients.mean(axis=2)]
    noise, signal = (np.array([getattr(step, name) for step in steps]) for name in ("grad_cov_trace", "grad_sq_norm"))
    for values, truth in ((noise, trace), (signal, square)):
        error = values.std(ddof=1) / math.sqrt(draws)
        assert abs(values.mean() - truth) < 3 * error
        assert error < 0.02 * truth, "a test that can fail"
    # the gradient norm is not an estimate of the signal: it also contains S / b
    assert np.mean([step.mean_grad_sq_norm for step in steps]) > 1.3 * square

    smoothed = Moments(
        num_micro_batches=groups,
        micro_batch_size=size,
        grad_cov_trace=float(noise.mean()),
        grad_sq_norm=float(signal.mean()),
    )
    for eta in (0.3, 1.0, 2.0):
        target, truth = NormTest(eta=eta, **ANY).target(smoothed), trace / (eta**2 * square)
        covariance = np.cov(noise, signal)
        gradient = np.array([1 / smoothed.grad_sq_norm, -smoothed.grad_cov_trace / smoothed.grad_sq_norm**2]) / eta**2
        assert abs(target - truth) < 3 * math.sqrt(gradient @ covariance @ gradient / draws)  # delta method


def test_unbiased_grows_to_the_target_and_may_shrink_to_it():
    noise = Moments(num_micro_batches=4, micro_batch_size=2, grad_cov_trace=10.0, grad_sq_norm=1.0)  # b = 8
    assert after(NormTest(eta=1.0, initial_size=8, max_size=100), noise) == 10
    assert after(NormTest(eta=0.5, initial_size=8, max_size=100), noise) == 40
    assert after(NormTest(eta=2.0, initial_size=8, max_size=100), noise) == 8
    assert after(NormTest(eta=2.0, initial_size=8, max_size=100, min_size=1, shrink=True), noise) == 3  # 2.5


def test_a_negative_signal_estimate_changes_nothing():
    policy = NormTest(eta=1.0, initial_size=8, max_size=100, min_size=1, shrink=True)
    assert after(policy, Moments(grad_cov_trace=10.0, grad_sq_norm=-1.0)) == 8


def test_the_noise_scale_policy_has_the_target_of_the_norm_test():
    noise = Moments(grad_cov_trace=123.0, grad_sq_norm=4.0)
    assert NoiseScale(coefficient=4.0, **ANY).target(noise) == NormTest(eta=0.5, **ANY).target(noise) == 123.0


@pytest.mark.parametrize("estimator", ["unbiased", "paper"])
def test_an_unmeasured_step_changes_nothing(estimator):
    zero = Moments(
        num_micro_batches=4, sum_micro_grad_sq_norms=1.0, mean_grad_sq_norm=0.0, grad_cov_trace=1.0, grad_sq_norm=0.0
    )
    assert NormTest(eta=0.5, estimator=estimator, **ANY).target(zero) is None
    tiny = Moments(
        num_micro_batches=4,
        sum_micro_grad_sq_norms=1.0,
        mean_grad_sq_norm=1e-320,
        grad_cov_trace=1.0,
        grad_sq_norm=1e-320,
    )
    assert after(NormTest(eta=1e-9, estimator=estimator, **ANY), tiny) == 1


def test_one_group_has_no_spread():
    assert paper(eta=0.5, workers=4).target(Moments(num_micro_batches=1)) is None


def test_equal_groups_have_zero_spread_despite_rounding():
    rounded = Moments(num_micro_batches=3, sum_micro_grad_sq_norms=3.0 - 1e-9, mean_grad_sq_norm=1.0)
    assert paper(eta=0.5).target(rounded) == 0.0


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"workers": 4}, r'^workers: .*estimator = "paper"'),
        ({"workers": 1, "estimator": "paper"}, r"^workers: .* 2 or more"),
        ({"shrink": True, "estimator": "paper"}, r'^shrink: .*estimator = "unbiased"'),
    ],
)
def test_keys_of_the_other_estimator_are_refused(keys, said):
    with pytest.raises(ValueError, match=said):
        NormTest(eta=0.5, **{**ANY, **keys})
