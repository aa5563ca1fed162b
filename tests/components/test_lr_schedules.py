"""Schedules against their published values, their limits, and a float64 reference of the printed formula."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.lr_schedules import DECAYS, WSD, Constant, Cosine, Linear, Power

pytestmark = pytest.mark.quick

TRILLION = 10**12


@pytest.mark.parametrize(
    ("sequences", "tokens", "published"),
    [
        (64, 10**9, 0.0066),
        (64, 10**10, 0.0020),
        (64, 10**11, 0.00063),
        (64, 10**12, 0.00019),
        (1024, 10**9, 0.02),
        (1024, 10**10, 0.02),
        (1024, 10**11, 0.0101),
        (1024, 10**12, 0.0031),
    ],
)
def test_power_has_the_published_check_values(sequences, tokens, published):
    lr = Power().lr(tokens, sequences * 4096, total_tokens=10 * TRILLION)
    assert lr == pytest.approx(published, rel=0.03)  # the table prints two digits


def test_power_leaves_its_cap_where_the_formula_says():
    for sequences, leaves in ((32, 2.9e7), (64, 1.1e8), (256, 1.7e9), (1024, 2.6e10)):
        schedule = Power()
        before = schedule.lr(int(leaves * 0.9), sequences * 4096, TRILLION)
        after = schedule.lr(int(leaves * 1.15), sequences * 4096, TRILLION)
        assert before == schedule.max_lr > after


def test_power_is_linear_in_the_batch_of_the_step():
    schedule = Power()
    one, two = (schedule.lr(10**11, n * 4096, TRILLION) for n in (100, 200))
    assert two == pytest.approx(2 * one, rel=1e-12)


@pytest.mark.parametrize("schedule", [Power(), WSD(max_lr=1e-3), Cosine(max_lr=1e-3), Linear(max_lr=1e-3)])
def test_no_warmup_neither_divides_by_zero_nor_raises_zero_to_a_negative_power(schedule):
    assert schedule.lr(0, 4096, 10**6) == schedule.max_lr


@pytest.mark.parametrize("kind", [Constant, Cosine, Linear, WSD, Power])
def test_warmup_is_linear_in_the_tokens_at_the_end_of_the_step_and_never_zero(kind):
    schedule = kind(max_lr=0.01, warmup_tokens=1000)
    total = 10**9
    rates = [schedule.lr(tokens, 100, total) for tokens in range(0, 1000, 100)]
    peak = rates[-1]
    assert rates == pytest.approx([peak * (i + 1) / 10 for i in range(10)])
    assert rates[0] > 0


def test_power_warms_up_to_the_law_at_the_end_of_warmup():
    schedule = Power(warmup_tokens=10**9)
    target = 64 * 4 * (10**9) ** -0.51
    assert schedule.lr(5 * 10**8, 64 * 4096, TRILLION) == pytest.approx(target * (5 * 10**8 + 64 * 4096) / 10**9)
    assert schedule.lr(10**9, 64 * 4096, TRILLION) == pytest.approx(target)


def test_power_decays_from_the_law_at_the_start_of_the_decay():
    schedule = Power(decay="linear", decay_fraction=0.1)
    total, batch = 10**11, 64 * 4096
    start = schedule.lr(9 * 10**10, batch, total)
    assert start == pytest.approx(64 * 4 * (9 * 10**10) ** -0.51)
    assert schedule.lr(95 * 10**9, batch, total) == pytest.approx(start / 2)


@pytest.mark.parametrize("shape", DECAYS)
@given(end=st.floats(0, 1))
def test_every_decay_falls_from_one_to_its_min_lr_ratio(shape, end):
    values = [DECAYS[shape](i / 50, end) for i in range(51)]
    assert values[0] == pytest.approx(1)
    assert values[-1] == pytest.approx(end, abs=1e-12)
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(values))


def test_exponential_decay_is_the_printed_closed_form():
    r, p = 0.1, 0.3
    printed = (1 - r) * math.e / (math.e - 1) * math.exp(-p) + (r * math.e - 1) / (math.e - 1)
    assert DECAYS["exponential"](p, r) == pytest.approx(printed, rel=1e-14)


def test_wsd_is_stable_until_its_decay_and_ends_at_its_ratio():
    schedule = WSD(max_lr=2.0, decay="linear", decay_tokens=200, min_lr_ratio=0.5)
    assert [schedule.lr(t, 10, 1000) for t in (0, 500, 800)] == [2.0, 2.0, 2.0]
    assert schedule.lr(900, 10, 1000) == pytest.approx(1.5)
    assert schedule.lr(1000, 10, 1000) == pytest.approx(1.0)


@pytest.mark.parametrize("kind", [WSD, Power])
@given(tokens=st.integers(0, 800), batch=st.integers(1, 10**6), total=st.integers(1000, 10**6))
def test_moving_the_end_leaves_the_stable_phase_as_it_was(kind, tokens, batch, total):
    """To the last bit, for the step that starts where the shorter run begins to decay, too."""
    schedule = kind(max_lr=1.0, warmup_tokens=100, decay_tokens=200)
    assert schedule.lr(tokens, batch, total) == schedule.lr(tokens, batch, 1000)


@pytest.mark.parametrize("shape", DECAYS)
@pytest.mark.parametrize("kind", [WSD, Power])
def test_every_decay_ends_at_its_fraction_of_the_lr_at_its_start(kind, shape):
    schedule = kind(max_lr=0.02, decay=shape, decay_tokens=2 * 10**9, min_lr_ratio=0.25)
    total, batch = 10**10, 64 * 4096
    start = schedule.lr(8 * 10**9, batch, total)
    assert start == (0.02 if kind is WSD else pytest.approx(64 * 4 * (8 * 10**9) ** -0.51))
    assert schedule.lr(total, batch, total) == pytest.approx(start / 4)


def test_power_with_a_warm_up_longer_than_its_stable_phase_decays_from_the_law_where_the_decay_starts():
    schedule = Power(warmup_tokens=9 * 10**9, decay="linear", decay_tokens=2 * 10**9)
    total, batch = 10**10, 64 * 4096
    law = 64 * 4 * (8 * 10**9) ** -0.51
    assert schedule.lr(9 * 10**9, batch, total) == pytest.approx(law / 2)


def test_decay_length_is_given_once():
    with pytest.raises(ValueError, match=r"^decay_tokens: "):
        WSD(max_lr=1.0, decay_tokens=10, decay_fraction=0.1)


def test_cosine_passes_its_half_way_mark():
    schedule = Cosine(max_lr=1.0, min_lr_ratio=0.2)
    assert schedule.lr(500, 1, 1000) == pytest.approx(0.6)
    assert schedule.lr(1000, 1, 1000) == pytest.approx(0.2)


RULED = [Constant, Cosine, Linear, WSD]


@pytest.mark.parametrize("kind", RULED)
@given(tokens=st.integers(0, 10**6), batch=st.integers(1, 10**6))
def test_batch_scaling_is_a_factor_on_the_lr_of_the_step(kind, tokens, batch):
    plain = kind(max_lr=0.01, warmup_tokens=1000)
    for rule, exponent in (("sqrt", 0.5), ("linear", 1.0)):
        ruled = kind(max_lr=0.01, warmup_tokens=1000, batch_scaling=rule, reference_batch_tokens=4096)
        expected = plain.lr(tokens, batch, 10**6) * (batch / 4096) ** exponent
        assert ruled.lr(tokens, batch, 10**6) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", RULED)
@pytest.mark.parametrize("rule", ["sqrt", "linear"])
def test_batch_scaling_changes_nothing_at_its_reference(kind, rule):
    plain = kind(max_lr=0.01, warmup_tokens=1000)
    ruled = kind(max_lr=0.01, warmup_tokens=1000, batch_scaling=rule, reference_batch_tokens=300)
    for tokens in (0, 500, 5000, 9900):
        assert ruled.lr(tokens, 300, 10**4) == plain.lr(tokens, 300, 10**4)


@pytest.mark.parametrize("kind", RULED)
def test_without_batch_scaling_the_batch_does_not_matter_after_warm_up(kind):
    schedule = kind(max_lr=0.01)
    assert schedule.lr(500, 1, 1000) == schedule.lr(500, 10**6, 1000)


@pytest.mark.parametrize("kind", RULED)
@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"batch_scaling": "sqrt"}, r"^reference_batch_tokens: required by batch_scaling = 'sqrt'"),
        ({"reference_batch_tokens": 4096}, r"^reference_batch_tokens: has no effect without batch_scaling"),
    ],
)
def test_batch_scaling_and_its_reference_require_each_other(kind, keys, said):
    with pytest.raises(ValueError, match=said):
        kind(max_lr=0.01, **keys)


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"batch_scaling": "sqrt", "reference_batch_tokens": 4096}, "batch_scaling"),
        ({"batch_scaling": "linear"}, "batch_scaling"),
        ({"reference_batch_tokens": 4096}, "reference_batch_tokens"),
    ],
)
def test_power_refuses_batch_scaling(keys, key):
    with pytest.raises(ValueError, match=rf"^{key}: Power already scales linearly with the batch"):
        Power(**keys)
    assert Power(batch_scaling="none") == Power()
