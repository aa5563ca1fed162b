"""Ramps by tokens, by fraction of the run, and linear ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.batch import Ramp, Stage
from tests.components.batch.moments import clock

pytestmark = pytest.mark.quick


def sizes(ramp: Ramp, *tokens: int, total: int = 1000) -> list[int]:
    return [ramp.next_batch_size(clock(each, total)) for each in tokens]


def test_stages_by_fraction_move_with_the_length_of_the_run():
    """The stages of arXiv 2412.21124: 2.5, 2.5 and 95 % of the samples."""
    ramp = Ramp(
        initial_size=2048, stages=[Stage(from_fraction=0.025, samples=4096), Stage(from_fraction=0.05, samples=8192)]
    )
    assert sizes(ramp, 0, 24, 25, 49, 50, 999) == [2048, 2048, 4096, 4096, 8192, 8192]
    assert sizes(ramp, 49, 50, 99, 100, total=2000) == [2048, 4096, 4096, 8192]


def test_a_linear_ramp_interpolates_between_its_stages():
    stages = [Stage(from_tokens=100, samples=16), Stage(from_tokens=300, samples=64)]
    ramp = Ramp(initial_size=8, stages=stages, linear=True)
    assert sizes(ramp, 0, 50, 100, 200, 299, 300, 1000) == [8, 12, 16, 40, 64, 64, 64]
    assert sizes(Ramp(initial_size=8, stages=stages), 50, 200) == [8, 16]


def test_a_linear_ramp_rounds_to_the_nearest_multiple():
    ramp = Ramp(initial_size=8, stages=[Stage(from_tokens=100, samples=24)], linear=True, multiple_of=8)
    assert sizes(ramp, 0, 24, 25, 74, 75, 100) == [8, 8, 16, 16, 24, 24]


def test_a_linear_ramp_by_fraction():
    ramp = Ramp(initial_size=10, stages=[Stage(from_fraction=0.5, samples=110)], linear=True)
    assert sizes(ramp, 0, 250, 500, 900) == [10, 60, 110, 110]


def test_a_stage_may_start_at_once():
    assert sizes(Ramp(initial_size=8, stages=[Stage(from_tokens=0, samples=16)], linear=True), 0, 5) == [16, 16]


@given(
    starts=st.lists(st.integers(0, 1000), unique=True, max_size=4).map(sorted),
    units=st.lists(st.integers(1, 50), min_size=5, max_size=5),
    multiple=st.integers(1, 8),
    tokens=st.integers(0, 1000),
)
def test_linear_sizes_are_multiples_between_neighboring_stages(starts, units, multiple, tokens):
    stages = [Stage(from_tokens=at, samples=n * multiple) for at, n in zip(starts, units[1:], strict=False)]
    steps = Ramp(initial_size=units[0] * multiple, stages=stages)
    ramp = Ramp(initial_size=units[0] * multiple, stages=stages, linear=True, multiple_of=multiple)
    size = ramp.next_batch_size(clock(tokens, 1000))
    here = steps.next_batch_size(clock(tokens, 1000))
    following = next((stage.samples for stage in stages if (stage.from_tokens or 0) > tokens), here)
    assert size % multiple == 0
    assert min(here, following) <= size <= max(here, following)


@pytest.mark.parametrize("keys", [{}, {"from_tokens": 1, "from_fraction": 0.5}])
def test_a_stage_starts_at_tokens_or_at_a_fraction(keys):
    with pytest.raises(ValueError, match=r"^from_tokens: .* set exactly one of the two"):
        Stage(samples=8, **keys)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"stages": [Stage(from_tokens=5, samples=8), Stage(from_fraction=0.5, samples=8)]},
            r"^stages: .* same key in all stages",
        ),
        (
            {"stages": [Stage(from_fraction=0.5, samples=8), Stage(from_fraction=0.5, samples=8)]},
            r"^stages: .* 0.5 follows",
        ),
        ({"stages": [], "multiple_of": 8}, r"^multiple_of: .* linear = true"),
        (
            {"stages": [Stage(from_tokens=5, samples=12)], "multiple_of": 8, "linear": True},
            r"^multiple_of: 8 does not .* 12",
        ),
    ],
)
def test_contradictory_keys_are_refused(keys, said):
    with pytest.raises(ValueError, match=said):
        Ramp(initial_size=8, **keys)
