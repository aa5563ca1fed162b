from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.data.mixing_schedule import MAX_PERIOD, MixingSchedule, StagedMixingSchedule, integer_weights

pytestmark = pytest.mark.quick

WEIGHTS = st.lists(st.integers(0, 60), min_size=1, max_size=8).filter(any)


def brute_counts(schedule, samples: int, sources: int) -> np.ndarray:
    """(samples + 1, sources): how many of each source the first n samples hold, counted one by one."""
    taken, _ = schedule(np.arange(samples))
    return np.concatenate([np.zeros((1, sources)), np.cumsum(np.eye(sources)[taken], axis=0)])


@settings(max_examples=300, deadline=None)
@given(weights=WEIGHTS)
def test_every_prefix_has_exact_proportions_within_one_sample(weights):
    schedule = MixingSchedule(weights)
    samples = 2 * sum(weights) + 3
    counts = brute_counts(schedule, samples, len(weights))
    # In whole numbers: |count - n W / P| < 1 is |P count - n W| < P.
    period = sum(weights)
    assert (np.abs(period * counts - np.arange(samples + 1)[:, None] * np.array(weights)) < period).all()
    # A window of one period, wherever it starts, is exact; so is any number of them.
    assert (counts[period:] - counts[:-period] == np.array(weights)).all()


@settings(max_examples=200, deadline=None)
@given(weights=WEIGHTS, sample=st.integers(0, 10**12))
def test_a_sample_does_not_depend_on_those_requested_with_it(weights, sample):
    schedule = MixingSchedule(weights)
    (source,), (number,) = schedule(np.array([sample]))
    counts = schedule.counts(sample)
    assert counts.sum() == sample
    assert number == counts[source]
    assert schedule.counts(sample + 1)[source] == number + 1


@settings(max_examples=100, deadline=None)
@given(data=st.data(), sources=st.integers(1, 4), stages=st.integers(1, 4))
def test_a_stage_continues_each_source_where_the_previous_one_ended(data, sources, stages):
    weights = st.lists(st.integers(0, 9), min_size=sources, max_size=sources).filter(any)
    starts = [0, *sorted(data.draw(st.sets(st.integers(1, 80), min_size=stages - 1, max_size=stages - 1)))]
    course = [(start, data.draw(weights)) for start in starts]
    staged = StagedMixingSchedule(course)
    taken, numbers = staged(np.arange(120))
    for source in range(sources):
        assert numbers[taken == source].tolist() == list(range((taken == source).sum()))
    for end in (0, 1, *starts, 119, 120):
        assert staged.counts(end).tolist() == np.bincount(taken[:end], minlength=sources).tolist()
    for (start, wanted), end in zip(course, [*starts[1:], 120], strict=True):
        for n in range(1, end - start + 1):  # within 1/n of the weights from the start of the stage
            shares = np.bincount(taken[start : start + n], minlength=sources) / n
            assert np.abs(shares - np.array(wanted) / sum(wanted)).max() < 1 / n + 1e-12


def test_the_pattern_is_this_one_on_every_machine():
    # Do not change: resumed runs rely on it.
    assert MixingSchedule([7, 3])(np.arange(10))[0].tolist() == [0, 0, 1, 0, 0, 1, 0, 0, 0, 1]
    assert MixingSchedule([3, 0, 2, 1])(np.arange(6))[0].tolist() == [0, 2, 0, 2, 0, 3]


def test_weights_are_the_decimals_that_were_written():
    assert integer_weights({"a": 0.7, "b": 0.3}) == {"a": 7, "b": 3}
    assert integer_weights({"a": 1, "b": 1.0, "c": 0}) == {"a": 1, "b": 1, "c": 0}
    assert integer_weights({"a": 0.1, "b": 0.2, "c": 0.3}) == {"a": 1, "b": 2, "c": 3}
    assert integer_weights({"a": 1e-4, "b": 0.9999}) == {"a": 1, "b": 9999}


@given(st.dictionaries(st.text(max_size=2), st.decimals(0, 1, places=2).map(float), min_size=1, max_size=5))
def test_proportions_are_kept_exactly(weights):
    if not any(weights.values()):
        with pytest.raises(ValueError, match="no weight is above 0"):
            integer_weights(weights)
        return
    whole, exact = integer_weights(weights), {name: Fraction(str(weight)) for name, weight in weights.items()}
    assert all(whole[n] * sum(exact.values()) == exact[n] * sum(whole.values()) for n in weights)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": -1, "b": 2}, "weights: a = -1; expected a number >= 0"),
        ({"a": float("nan")}, "a = nan"),
        ({"a": float("inf")}, "a = inf"),
        ({}, "no weight is above 0"),
        (
            {"a": 3_812_345_677, "b": 1_200_000_000},
            r"at most 100,000 is supported; round them, .* a = 0\.7606, b = 0\.2394",
        ),
    ],
)
def test_impossible_weights_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        integer_weights(weights)


def test_the_longest_period_is_supported():
    weights = [MAX_PERIOD - 3, 2, 1]
    assert MixingSchedule(weights).counts(10 * MAX_PERIOD).tolist() == [10 * weight for weight in weights]
