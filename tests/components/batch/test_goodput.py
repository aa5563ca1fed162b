"""Goodput chooses the best of all sizes from times and noise that the tests make up."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.batch import BatchPolicy, Goodput, StepTime
from components.batch.step_times import StepCost, efficiency
from tests.components.batch.moments import FLOATS, Moments, built, clock

pytestmark = pytest.mark.quick

UNIT = 2
"""Samples of one micro-batch on all ranks."""
KEYS = {"initial_size": 8, "max_size": 1024, "multiple_of": UNIT, "min_gain": 0.01}


def seconds(fixed: float, micro_batch: float) -> Callable[[int], float]:
    return lambda micro_batches: fixed + micro_batches * micro_batch


def sizes(
    policy: BatchPolicy, cost: Callable[[int], float], noise_scale: float, steps: int = 60, layout: str = "one"
) -> list[int]:
    """Return the sizes of `steps` steps whose times are observed one step later, as in a run."""
    progress, found = clock(), []
    earlier: StepTime | None = None
    for _ in range(steps):
        size = policy.next_batch_size(progress)
        progress.advance(size)
        if earlier is not None:
            policy.observe_time(earlier)
        earlier = StepTime(layout, size // UNIT, size, cost(size // UNIT))
        policy.observe(progress, Moments(num_micro_batches=size, grad_cov_trace=noise_scale))
        found.append(size)
    return found


positive = st.floats(1e-3, 1e3)


@given(fixed=st.floats(0, 1e3), micro_batch=positive, noise_scale=positive, limit=st.integers(1, 2000))
def test_no_size_within_the_limit_makes_more_progress(fixed, micro_batch, noise_scale, limit):
    cost = StepCost(fixed, micro_batch, UNIT)
    best = min(cost.best_batch(noise_scale), limit)
    if best > 1e-3:
        assert max(cost.gain(size, best, noise_scale) for size in range(1, limit + 1)) <= 1e-9
    else:  # without a fixed cost a smaller batch is always better
        assert all(cost.gain(size + 1, size, noise_scale) <= 1e-9 for size in range(1, limit))


@pytest.mark.parametrize("keys", [{}, {"max_growth": 2}, {"max_growth": 1.5, "cooldown_samples": 100}])
@pytest.mark.parametrize("fixed, micro_batch, noise_scale", [(1.0, 0.1, 50), (1.0, 0.1, 400), (0.3, 0.01, 100)])
def test_it_grows_to_the_best_of_all_sizes(keys, fixed, micro_batch, noise_scale):
    cost = StepCost(fixed, micro_batch, UNIT)
    last = sizes(built(Goodput(**KEYS, **keys)), seconds(fixed, micro_batch), noise_scale, 200)[-1]
    allowed = [size for size in range(8, 1025, UNIT) if efficiency(size, noise_scale) >= 0.5]
    assert max(cost.gain(size, last, noise_scale) for size in allowed) < 0.01
    assert efficiency(last, noise_scale) >= 0.5


@pytest.mark.parametrize("shrink", [True, False])
@pytest.mark.parametrize("noise_scale", [20, 1000, 1e6])
def test_without_a_fixed_cost_it_stays_at_the_smallest_size(shrink, noise_scale):
    policy = built(Goodput(**KEYS, shrink=shrink))
    found = sizes(policy, seconds(0, 0.1), noise_scale, 480)
    assert set(found) == {8, 16}
    assert found.count(16) <= 10, "only until the time of the larger size is known"
    assert found[-1] == 8
    more = sizes(policy, seconds(0, 0.1), noise_scale, 520)
    assert 0 < more.count(16) <= 20, "forgotten, it is measured again"


def test_it_shrinks_to_the_smallest_size_when_the_fixed_cost_vanishes():
    policy = built(Goodput(**{**KEYS, "initial_size": 64}, min_size=8, shrink=True, memory_steps=50))
    assert max(sizes(policy, seconds(10, 0.1), 200)) == 200
    assert sizes(policy, seconds(0, 0.1), 200, 300)[-1] in (8, 16), "16 if it is just being tried"


def test_times_that_do_not_depend_on_the_batch_lead_to_the_floor():
    assert sizes(built(Goodput(**KEYS, min_efficiency=0.8)), seconds(1, 0), 400)[-1] == 100
    assert sizes(built(Goodput(**KEYS)), seconds(1, -1e-4), 401)[-1] == 400, "rounded down to a multiple"


@pytest.mark.parametrize("floor", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("noise_scale", [5, 12, 24, 300])
def test_no_step_is_below_the_efficiency_floor_except_at_the_initial_size(floor, noise_scale):
    found = sizes(built(Goodput(**KEYS, min_efficiency=floor)), seconds(5, 0.01), noise_scale)
    assert all(size == 8 or efficiency(size, noise_scale) >= floor for size in found)


def test_a_batch_below_the_floor_shrinks_before_any_time_is_known():
    policy = built(Goodput(**{**KEYS, "initial_size": 64}, min_size=8, shrink=True))
    assert sizes(policy, seconds(1, 0.1), 20, 3) == [64, 20, 20]


def test_noisy_times_choose_about_the_same_size():
    random = np.random.default_rng(0)
    exact = StepCost(1.0, 0.1, UNIT).best_batch(400)

    def noisy(micro_batches: int) -> float:
        slow = 20.0 if random.random() < 0.1 else 1.0  # a checkpoint in the background, another process
        return (1.0 + 0.1 * micro_batches) * random.uniform(0.95, 1.05) * slow

    for _ in range(20):
        last = sizes(built(Goodput(**{**KEYS, "min_gain": 0.05}, max_growth=2, shrink=True)), noisy, 400, 200)[-1]
        assert exact / 2 < last < exact * 2


def test_noise_in_the_times_of_a_step_without_fixed_cost_does_not_grow_the_batch():
    random = np.random.default_rng(0)
    for _ in range(20):
        policy = built(Goodput(**{**KEYS, "min_gain": 0.1}))
        found = sizes(policy, lambda count: 0.1 * count * random.uniform(0.97, 1.03), 1000, 400)
        assert set(found) == {8, 16} and found[-1] == 8


def test_a_size_is_tried_only_if_the_batch_could_change():
    assert set(sizes(built(Goodput(**{**KEYS, "max_size": 8})), seconds(1, 0.1), 400)) == {8}
    assert set(sizes(built(Goodput(**KEYS, delay_tokens=10**6)), seconds(1, 0.1), 400)) == {8}
    down = Goodput(**{**KEYS, "max_size": 8}, min_size=2, shrink=True)
    assert set(sizes(built(down), seconds(1, 0.1), 400)) == {8, 4}
    limited = Goodput(**{**KEYS, "initial_size": 40}, max_growth=1.25)
    assert set(sizes(built(limited), seconds(0, 0.1), 400)) == {40, 50}


def test_the_metrics_explain_the_choice():
    policy = built(Goodput(**KEYS))
    assert policy.metrics() == {}
    assert sizes(policy, seconds(0.4, 0.1), 72, 100)[-1] == 24
    # sqrt(72 x 0.4 / 0.05) = 24 samples, and 72 / (72 + 24)
    assert policy.metrics() == pytest.approx(
        {
            "goodput_fixed_seconds": 0.4,
            "goodput_micro_batch_seconds": 0.1,
            "goodput_efficiency": 0.75,
            "goodput_wanted_size": 24,
            "goodput_gain": 0,
        }
    )


def test_a_resumed_policy_continues_and_forgets_the_times_of_another_layout():
    def resumed() -> BatchPolicy:
        policy = built(Goodput(**KEYS))
        policy.load_state_dict(json.loads(json.dumps(state)))
        return policy

    policy = built(Goodput(**KEYS))
    assert sizes(policy, seconds(0, 0.1), 400, 30)[-1] == 8
    state = policy.state_dict()
    assert resumed().state_dict() == json.loads(json.dumps(state))
    same = sizes(resumed(), seconds(0, 0.1), 400, 100)
    assert set(same) == {8}, "no size is tried again"
    other = sizes(resumed(), seconds(1, 0.1), 400, 100, layout="another")
    assert other[:9] == [8] * 9 and 16 in other, "the current size is measured first"
    assert other[-1] == 90


@pytest.mark.parametrize("layout, size", [("one", 90), ("another", 8)])
def test_restored_times_decide_only_after_a_step_of_their_layout(layout, size):
    before = built(Goodput(**KEYS))
    for micro_batches in 8 * [4, 8]:  # enough times to grow at once
        before.observe_time(StepTime("one", micro_batches, UNIT * micro_batches, 1 + 0.1 * micro_batches))
    policy = built(Goodput(**KEYS))
    policy.load_state_dict(json.loads(json.dumps(before.state_dict())))
    noise = Moments(num_micro_batches=8, grad_cov_trace=400.0)
    policy.observe(clock(8), noise)
    assert policy.next_batch_size(clock(8)) == 8
    policy.observe_time(StepTime(layout, 4, 8, 1.4))
    policy.observe(clock(16), noise)
    assert policy.next_batch_size(clock(16)) == size


def test_the_state_of_another_policy_keeps_its_size():
    policy = built(Goodput(**KEYS))
    policy.load_state_dict({"samples": 24, "changed_at": None})
    assert policy.next_batch_size(clock()) == 24


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 0.0, 5e-324, 1e308])
def test_extreme_noise_keeps_the_size_within_its_bounds(name, value):
    for shrink in (True, False):
        policy = built(Goodput(**KEYS, min_size=4, shrink=shrink))
        sizes(policy, seconds(1, 0.1), 400)
        policy.observe(clock(10**4), replace(Moments(grad_cov_trace=400.0), **{name: value}))
        assert 4 <= policy.next_batch_size(clock()) <= 1024
        assert all(map(math.isfinite, policy.metrics().values()))


def test_an_unknown_noise_scale_tries_nothing():
    policy, progress = built(Goodput(**KEYS)), clock()
    for _ in range(20):
        progress.advance(8)
        policy.observe_time(StepTime("one", 4, 8, 1.0))
        policy.observe(progress, Moments(grad_sq_norm=-1.0))
        policy.observe(progress, None)
        assert policy.next_batch_size(progress) == 8


@pytest.mark.parametrize("keys", [{"min_efficiency": 0.0}, {"min_efficiency": 1.0}, {"memory_steps": 49}])
def test_keys_outside_of_their_range_are_refused(keys, tiny, capsys):
    arguments = [f"--batch.{key}={value}" for key, value in {**KEYS, **keys}.items()]
    assert tiny.launch("--batch.use=components.batch:Goodput", *arguments) == 2
    assert f"batch.{next(iter(keys))}" in capsys.readouterr().err
