"""What all adaptive batches share, on a policy whose target the test sets."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.batch import Adaptive, BatchPolicy, BatchRounding, NoiseScale
from tests.components.batch.moments import FLOATS, Moments, built, clock, wants

pytestmark = pytest.mark.quick


def sizes(policy: Adaptive | BatchPolicy, *targets: float | Moments | None, start: int = 0) -> list[int]:
    """Return the size after each step of the requested size; a float is the target, None an unmeasured step."""
    policy = policy if isinstance(policy, BatchPolicy) else built(policy)
    progress, found = clock(start), []
    for target in targets:
        batch = policy.next_batch_size(progress)
        progress.advance(batch)
        policy.observe(progress, wants(target, batch) if isinstance(target, (int, float)) else target)
        found.append(policy.next_batch_size(progress))
    return found


def test_it_starts_at_initial_and_grows_to_the_target_rounded_up():
    policy = built(NoiseScale(initial_size=8, max_size=1000))
    assert policy.next_batch_size(clock()) == 8
    assert sizes(policy, 20.2, 30.0) == [21, 30]


def test_a_policy_follows_the_norm_that_it_names():
    both = replace(wants(30), adam=wants(20))
    assert sizes(NoiseScale(initial_size=8, max_size=1000, norm="adam"), wants(30), both) == [8, 20]
    assert sizes(NoiseScale(initial_size=8, max_size=1000), wants(30), both) == [30, 30]


def test_an_unmeasured_step_changes_nothing():
    assert sizes(NoiseScale(initial_size=8, max_size=1000), None, 20, None) == [8, 20, 20]


def test_bounds_hold():
    assert sizes(NoiseScale(initial_size=8, max_size=100), 1e300, 50) == [100, 100]
    assert sizes(NoiseScale(initial_size=8, max_size=100, min_size=4, shrink=True), 1e300, 50, 1e-300, 0) == [
        100,
        50,
        4,
        4,
    ]
    assert sizes(NoiseScale(initial_size=8, max_size=100, shrink=True), 50, 1) == [50, 8], "without minimum: initial"


def test_without_shrink_it_never_gets_smaller():
    assert sizes(NoiseScale(initial_size=8, max_size=100, min_size=4), 50, 5, 60) == [50, 50, 60]


def test_sizes_are_rounded_up_to_multiple_of():
    assert sizes(NoiseScale(initial_size=8, max_size=96, multiple_of=8), 8.5, 17, 95, 1000) == [16, 24, 96, 96]


def test_a_change_is_at_most_max_growth_and_stays_a_multiple():
    policy = NoiseScale(initial_size=16, max_size=1000, min_size=8, multiple_of=8, max_growth=2.5, shrink=True)
    assert sizes(policy, 900, 900, 900, 0, 0) == [40, 96, 240, 96, 40]


def test_a_limit_that_is_a_whole_number_is_not_lost_to_rounding():
    assert 45 * 1.4 < 63 and 21 / 1.4 > 15, "in floats"
    assert sizes(NoiseScale(initial_size=45, max_size=1000, max_growth=1.4), 900) == [63]
    assert sizes(NoiseScale(initial_size=21, min_size=10, max_size=1000, max_growth=1.4, shrink=True), 0) == [15]


def test_after_a_change_it_waits_for_the_cooldown():
    policy = NoiseScale(initial_size=10, max_size=1000, cooldown_samples=50)
    # 10 samples, then 20 each: at 30, 50 the cooldown since 10 is not over, at 70 it is
    assert sizes(policy, 20, 40, 40, 40, 80) == [20, 20, 20, 40, 40]


def test_a_target_within_the_hysteresis_changes_nothing():
    policy = NoiseScale(initial_size=100, max_size=1000, min_size=10, hysteresis=0.25, shrink=True)
    assert sizes(policy, 124, 76, 125, 94, 93) == [100, 100, 125, 125, 93]


def test_hysteresis_does_not_keep_the_batch_from_a_near_maximum():
    assert sizes(NoiseScale(initial_size=90, max_size=100, hysteresis=0.5), 120, 150) == [90, 100]


def test_nothing_is_decided_during_the_delay():
    policy = NoiseScale(initial_size=10, max_size=1000, delay_tokens=30)
    assert sizes(policy, 50, 50, 60, 70) == [10, 10, 60, 70], "decides after the third step, at 30 tokens"


def test_a_layout_that_rounds_up_may_already_reach_the_target():
    policy = built(NoiseScale(initial_size=10, max_size=100))
    batch = BatchRounding(micro_batch_size=8, dp_size=2).round_up(policy.next_batch_size(clock()))
    assert batch.samples == 16
    policy.observe(clock(16), wants(12, batch.samples))
    assert policy.next_batch_size(clock()) == 10
    policy.observe(clock(32), wants(17, batch.samples))
    assert policy.next_batch_size(clock()) == 17


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_moments_that_are_not_finite_are_ignored(name, value):
    policy = NoiseScale(initial_size=8, max_size=100, min_size=1, shrink=True)
    assert sizes(policy, 50, replace(wants(1), **{name: value})) == [50, 50]


def test_a_target_that_overflows_is_ignored():
    assert sizes(NoiseScale(initial_size=8, max_size=100), replace(wants(1e300), grad_sq_norm=1e-300)) == [8]


@pytest.mark.parametrize("signal", [0.0, -1.0])
def test_a_signal_that_is_not_positive_changes_nothing(signal):
    policy = NoiseScale(initial_size=8, max_size=100, min_size=1, shrink=True)
    assert sizes(policy, replace(wants(50), grad_sq_norm=signal)) == [8]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"min_size": 16}, r"^min_size: 16 is above initial_size = 8; .*"),
        ({"max_size": 4}, r"^max_size: 4 is below initial_size = 8; .*"),
        ({"multiple_of": 3}, r"^multiple_of: 3 does not divide initial_size = 8; .*"),
        ({"multiple_of": 8, "max_size": 100}, r"^multiple_of: 8 does not divide max_size = 100; .*"),
        ({"multiple_of": 8, "max_size": 80, "min_size": 4}, r"^multiple_of: 8 does not divide min_size = 4; .*"),
        (
            {"multiple_of": 8, "max_size": 80, "max_growth": 1.5},
            r"^max_growth: 1.5 x 8 samples is below .* use 2 or",
        ),
    ],
)
def test_keys_that_contradict_each_other_are_refused(keys, said):
    with pytest.raises(ValueError, match=said):
        NoiseScale(**{"initial_size": 8, "max_size": 100, **keys})


def test_a_restored_size_is_clamped_to_the_current_bounds():
    state = {"samples": 60, "changed_at": 5}
    for keys, expected in (
        ({"max_size": 40}, 40),
        ({"max_size": 600, "initial_size": 100}, 100),
        ({"max_size": 128, "multiple_of": 8}, 64),
        ({"max_size": 56, "multiple_of": 8}, 56),
    ):
        policy = built(NoiseScale(**{"initial_size": 8, **keys}))
        policy.load_state_dict(state)
        assert policy.next_batch_size(clock()) == expected


def test_the_state_of_a_stateless_policy_leaves_the_initial_size():
    policy = built(NoiseScale(initial_size=8, max_size=100))
    policy.load_state_dict({})
    assert sizes(policy, None, 50) == [8, 50]


# Whole runs, at random.

keys = st.fixed_dictionaries(
    {
        "multiple_of": st.sampled_from([1, 2, 8]),
        "max_growth": st.none() | st.floats(2, 8),
        "cooldown_samples": st.integers(0, 100),
        "hysteresis": st.floats(0, 0.5),
        "shrink": st.booleans(),
        "delay_tokens": st.integers(0, 50),
    }
)
measured = st.none() | st.builds(
    Moments,
    num_micro_batches=st.integers(2, 64),
    micro_batch_size=st.integers(1, 8),
    grad_cov_trace=st.floats(0, 1e4) | st.floats(),
    grad_sq_norm=st.floats(-1, 10) | st.floats(),
)
runs = st.lists(measured, min_size=1, max_size=30)
bounds = st.tuples(st.integers(1, 8), st.integers(0, 8), st.integers(0, 100))


def make(keys: dict[str, Any], bounds: tuple[int, int, int]) -> NoiseScale:
    """Minimum, and how far initial and maximum are above it, in units of multiple_of."""
    multiple, (lowest, above, span) = keys["multiple_of"], bounds
    initial = lowest + above
    return NoiseScale(
        min_size=multiple * lowest,
        initial_size=multiple * initial,
        max_size=multiple * (initial + span),
        coefficient=1.0,
        **keys,
    )


@given(keys=keys, bounds=bounds, run=runs)
def test_limits_hold_for_any_measurement(keys, bounds, run):
    config, progress = make(keys, bounds), clock()
    policy = built(config)
    changed_at, before = None, policy.next_batch_size(progress)
    for noise in run:
        progress.advance(before)
        policy.observe(progress, noise)
        after = policy.next_batch_size(progress)
        assert after % config.multiple_of == 0
        assert config.min_size <= after <= config.max_size
        assert config.shrink or after >= before
        if config.max_growth is not None:
            assert max(after / before, before / after) <= config.max_growth * (1 + 1e-9)
        if after != before:
            assert noise is not None
            assert math.isfinite(noise.grad_cov_trace) and math.isfinite(noise.grad_sq_norm)
            assert progress.tokens >= config.delay_tokens
            assert changed_at is None or progress.samples - changed_at >= config.cooldown_samples
            changed_at = progress.samples
        before = after


@given(keys=keys, bounds=bounds, run=runs, share=st.floats(0, 1))
def test_a_resumed_policy_equals_an_uninterrupted_one(keys, bounds, run, share):
    policy, progress, stop = built(make(keys, bounds)), clock(), int(share * len(run))

    def play(policy: BatchPolicy, progress: Any, part: list[Moments | None]) -> list[int]:
        found = []
        for noise in part:
            progress.advance(policy.next_batch_size(progress))
            policy.observe(progress, noise)
            found.append(policy.next_batch_size(progress))
        return found

    play(policy, progress, run[:stop])
    resumed, later = built(make(keys, bounds)), clock(progress.samples)
    resumed.load_state_dict(json.loads(json.dumps(policy.state_dict())))
    assert play(resumed, later, run[stop:]) == play(policy, progress, run[stop:])
    assert resumed.state_dict() == policy.state_dict()


@given(growth=st.floats(1.01, 4), multiple=st.integers(1, 16), lowest=st.integers(1, 50))
def test_an_accepted_growth_limit_lets_the_batch_reach_both_bounds(growth, multiple, lowest):
    bounds = {"initial_size": lowest * multiple, "max_size": 3 * lowest * multiple, "multiple_of": multiple}
    try:
        policy = NoiseScale(max_growth=growth, shrink=True, **bounds)
    except ValueError:
        assert lowest * multiple * growth < (lowest + 1) * multiple
        return
    assert sizes(policy, *[1e9] * 500)[-1] == policy.max_size
    assert sizes(policy, *[0.0] * 500)[-1] == policy.initial_size
