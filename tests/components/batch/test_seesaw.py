"""Seesaw against the closed form: the batch doubles where the schedule halves, and the lr falls by the root of two."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.batch import BatchPolicy, Seesaw
from components.lr_schedules import WSD, Constant, Cosine, Linear, Power
from tests.components.batch.moments import built, clock

pytestmark = pytest.mark.quick

LENGTH, TOTAL = 10, 100_000


def schedule(kind=Cosine, initial_size: int = 8, **keys):
    return kind(max_lr=1.0, batch_scaling="sqrt", reference_batch_tokens=initial_size * LENGTH, **keys)


def following(lr_schedule, **keys) -> BatchPolicy:
    config = Seesaw(**{"initial_size": 8, "max_size": 64, **keys})
    return built(config, lr_schedule, sequence_length=LENGTH, total_tokens=TOTAL)


def simulate(policy: BatchPolicy, lr_schedule, total: int = TOTAL) -> list[tuple[int, int, float]]:
    """Return (tokens before, batch, learning rate) of every step of a run."""
    progress, steps = clock(0, total, LENGTH), []
    while not progress.done:
        batch = policy.next_batch_size(progress)
        steps.append((progress.tokens, batch, lr_schedule.lr(progress.tokens, batch * LENGTH, total)))
        progress.advance(batch)
    return steps


def test_on_a_cosine_the_batch_doubles_where_the_cosine_has_halved():
    rate = schedule(min_lr_ratio=0.0)
    policy = following(rate)
    for j in range(1, 4):
        # (1 + cos(pi p)) / 2 = 2^-j
        halved = math.acos(2 * 2**-j - 1) / math.pi * TOTAL / LENGTH
        assert policy.next_batch_size(clock(math.floor(halved - 1e-6), TOTAL, LENGTH)) == 8 * 2 ** (j - 1)
        assert policy.next_batch_size(clock(math.ceil(halved + 1e-6), TOTAL, LENGTH)) == 8 * 2**j
    assert policy.next_batch_size(clock(TOTAL // LENGTH, TOTAL, LENGTH)) == 64


def test_at_each_doubling_the_lr_is_divided_by_the_root_of_two():
    """Peak, peak / sqrt(2), peak / 2, ...: the paper's staircase, at the steps where the schedule passes 2^-j."""
    rate = schedule(Linear, min_lr_ratio=0.0)
    policy = following(rate)
    firsts = {}
    for tokens, batch, lr in simulate(policy, rate):
        firsts.setdefault(batch, (tokens, lr))
    assert sorted(firsts) == [8, 16, 32, 64]
    for j, (tokens, lr) in enumerate(firsts[8 * 2**j] for j in range(4)):
        assert lr == pytest.approx(2 ** (-j / 2), rel=0.02)  # within one step of the passing
        assert tokens / TOTAL == pytest.approx(1 - 2**-j, abs=64 * LENGTH / TOTAL)


@pytest.mark.parametrize("min_lr_ratio", [0.0, 0.1])
@pytest.mark.parametrize("factor", [2.0, 1.1, 4.0])
@pytest.mark.parametrize("kind", [Cosine, Linear, WSD])
def test_lr_over_root_of_batch_equals_that_of_the_schedule_also_past_the_maximum(kind, factor, min_lr_ratio):
    """What the paper keeps equal (its alpha x sqrt(beta)); past the maximum the lr falls as the schedule does."""
    rate = schedule(kind, min_lr_ratio=min_lr_ratio, warmup_tokens=5000)
    alone = kind(max_lr=1.0, min_lr_ratio=min_lr_ratio, warmup_tokens=5000)
    steps = simulate(following(rate, factor=factor, max_size=20), rate)
    assert {batch for _, batch, _ in steps} >= {8, 20}
    for tokens, batch, lr in steps:
        # in the warm-up the learning rate counts the tokens of the step at hand, which is the initial batch
        assert lr / math.sqrt(batch / 8) == pytest.approx(alone.lr(tokens, batch * LENGTH, TOTAL), rel=1e-12)
    at_maximum = [(tokens, lr) for tokens, batch, lr in steps if batch == 20]
    for (t0, one), (t1, two) in pairwise(at_maximum):
        if one > 0:
            assert two / one == pytest.approx(alone.lr(t1, 80, TOTAL) / alone.lr(t0, 80, TOTAL), rel=1e-12)


def test_with_a_small_factor_the_lr_falls_like_the_root_of_the_schedule():
    rate = schedule(Linear, initial_size=1000, min_lr_ratio=0.0)
    policy = following(rate, initial_size=1000, max_size=8000, factor=1.01)
    total = 10**9
    for share in (0.1, 0.5, 0.8):
        progress = clock(int(share * total / LENGTH), total, LENGTH)
        lr = rate.lr(progress.tokens, policy.next_batch_size(progress) * LENGTH, total)
        assert lr == pytest.approx(math.sqrt(1 - share), rel=0.01)
        assert policy.next_batch_size(progress) == pytest.approx(1000 / (1 - share), rel=0.011)


def test_the_number_of_steps_is_about_the_theoretical_one():
    """With small factors a step holds peak / rate times the samples: the steps left are the mean of rate / peak."""
    rate = schedule(initial_size=8, min_lr_ratio=0.0)
    steps = simulate(following(rate, max_size=8000, factor=1.05), rate)
    assert len(steps) / (TOTAL / (8 * LENGTH)) == pytest.approx(1 / 2, rel=0.06)


def test_the_batch_is_initial_during_the_warm_up():
    policy = following(schedule(warmup_tokens=50_000))
    assert {policy.next_batch_size(clock(tokens // LENGTH, TOTAL, LENGTH)) for tokens in range(0, 50_000, 5000)} == {8}


def test_a_constant_lr_never_grows_the_batch():
    policy = following(schedule(Constant))
    assert policy.next_batch_size(clock(TOTAL // LENGTH, TOTAL, LENGTH)) == 8


def test_an_extended_run_uses_the_longer_schedule():
    policy = following(schedule(Linear, min_lr_ratio=0.0))
    assert policy.next_batch_size(clock(6000, TOTAL, LENGTH)) == 16
    assert policy.next_batch_size(clock(6000, 2 * TOTAL, LENGTH)) == 8


@given(
    share=st.floats(0, 1),
    factor=st.floats(1.05, 8),
    multiple=st.integers(1, 16),
    initial=st.integers(1, 8),
    more=st.integers(0, 100),
)
def test_sizes_are_growing_multiples_within_the_bounds(share, factor, multiple, initial, more):
    first, last = initial * multiple, (initial + more) * multiple
    policy = following(
        schedule(initial_size=first, min_lr_ratio=0.0),
        initial_size=first,
        max_size=last,
        factor=factor,
        multiple_of=multiple,
    )
    now, later = (
        policy.next_batch_size(clock(int(part * TOTAL / LENGTH), TOTAL, LENGTH)) for part in (share, (1 + share) / 2)
    )
    assert now % multiple == 0
    assert first <= now <= later <= last


@pytest.mark.parametrize(
    "wrong",
    [
        Cosine(max_lr=1.0),
        Cosine(max_lr=1.0, batch_scaling="linear", reference_batch_tokens=80),
        Cosine(max_lr=1.0, batch_scaling="sqrt", reference_batch_tokens=8),
        Power(),
    ],
)
def test_a_schedule_with_other_batch_scaling_is_refused(wrong):
    with pytest.raises(ValueError, match='batch_scaling = "sqrt" with reference_batch_tokens = 80'):
        following(wrong)


def test_a_schedule_that_lacks_batch_scaling_is_refused():
    with pytest.raises(ValueError, match="needs a schedule with max_lr and batch_scaling"):
        following(SimpleNamespace(lr=lambda *_: 1.0))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"max_size": 4}, r"^max_size: 4 is below"),
        ({"multiple_of": 3}, r"^multiple_of: 3 does not divide initial_size = 8"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(keys, said):
    with pytest.raises(ValueError, match=said):
        Seesaw(**{"initial_size": 8, "max_size": 64, **keys})
