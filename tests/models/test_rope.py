"""Rotary embedding against complex numbers, its defining property, and the limits of Llama 3's scaling."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from models.rope import RopeScaling, apply_rope, rope_frequencies, rope_table

pytestmark = pytest.mark.quick

CPU = torch.device("cpu")
LLAMA3 = RopeScaling()


@pytest.mark.parametrize("width", [2, 64, 100, 128])
def test_frequencies_are_the_powers_of_theta(width):
    frequencies = rope_frequencies(width, 10_000.0)
    assert len(frequencies) == width // 2
    assert frequencies[0] == 1
    ratios = [b / a for a, b in pairwise(frequencies)]
    assert ratios == pytest.approx([10_000 ** (-2 / width)] * len(ratios), rel=1e-12)


@pytest.mark.parametrize("width", [8, 100])
def test_rotation_is_multiplication_of_complex_numbers(width):
    length, half = 50, width // 2
    x = torch.randn(2, length, 3, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    frequencies = rope_frequencies(width, 10_000.0)
    angles = torch.outer(torch.arange(length).double(), torch.tensor(frequencies, dtype=torch.float64))[:, None]
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    reference = torch.cat((turned.real, turned.imag), -1)
    # the table is float32: angles up to 50 radians carry 2e-6
    torch.testing.assert_close(
        apply_rope(x, rope_table(length, torch.tensor(frequencies))), reference, rtol=0, atol=2e-5
    )


def test_scores_depend_on_the_distance_of_two_positions_alone():
    length = 64
    q, k = torch.randn(2, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    table = rope_table(length, torch.tensor(LLAMA3.frequencies(100, 10_000.0, 0)))
    turned_q, turned_k = (apply_rope(v.expand(1, length, 1, -1), table)[0, :, 0] for v in (q, k))
    scores = turned_q @ turned_k.T
    for distance in range(-length + 1, length):
        diagonal = scores.diagonal(distance)
        assert (diagonal - diagonal[0]).abs().max() < 1e-4, distance  # float32 angles; scores are some 10
    assert (scores[0] - scores[0, 0]).abs().max() > 1, "and they do depend on it"


def test_rotation_keeps_lengths_and_leaves_position_0_alone():
    x = torch.randn(2, 30, 4, 64, generator=torch.Generator().manual_seed(2))
    turned = apply_rope(x, rope_table(30, torch.tensor(rope_frequencies(64, 500_000.0))))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)  # float32
    assert torch.equal(turned[:, 0], x[:, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rotation_keeps_the_dtype_of_the_heads(dtype):
    x = torch.ones(1, 4, 2, 8, dtype=dtype)
    assert apply_rope(x, rope_table(4, torch.tensor(rope_frequencies(8, 10_000.0)))).dtype == dtype


def test_a_longer_table_begins_with_the_shorter():
    frequencies = rope_frequencies(64, 10_000.0)
    assert torch.equal(rope_table(100, torch.tensor(frequencies))[:, :7], rope_table(7, torch.tensor(frequencies)))


def test_scaling_keeps_fast_waves_stretches_slow_ones_and_blends_between():
    def at(turns: float) -> float:
        """What becomes of a frequency that turns so often within the original context, relative to it."""
        frequency = turns * 2 * math.pi / LLAMA3.original_max_position
        return LLAMA3.frequencies(4, frequency**-2, 0)[1] / frequency  # of two frequencies, 1 and this one

    assert [at(turns) for turns in (4, 5, 1000)] == [1, 1, 1]
    assert [at(turns) for turns in (1, 0.5, 0.001)] == pytest.approx([1 / 8] * 3, rel=1e-12)
    assert at(2.5) == pytest.approx((1 + 1 / 8) / 2)
    assert at(3.999999) == pytest.approx(1, rel=1e-5), "without a jump"
    assert at(1.000001) == pytest.approx(1 / 8, rel=1e-5)


def test_scaling_by_one_is_off():
    assert RopeScaling(factor=1).frequencies(64, 500_000.0, 0) == pytest.approx(
        rope_frequencies(64, 500_000.0), rel=1e-15
    )
    assert LLAMA3.frequencies(64, 500_000.0, 0) != rope_frequencies(64, 500_000.0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"factor": 0.5}, r"^factor: 0.5 must be at least 1"),
        ({"low_freq_factor": 4.0}, r"^high_freq_factor: 4.0 must be above low_freq_factor = 4.0"),
        ({"low_freq_factor": 0.0}, r"^high_freq_factor: .* both above 0"),
        ({"type": "linear", "beta_fast": 16.0}, r'^beta_fast: only valid with type = "yarn"; this is "linear"'),
        ({"type": "yarn", "low_freq_factor": 2.0}, r'^low_freq_factor: only valid with type = "llama3"'),
    ],
)
def test_a_scaling_that_makes_no_sense_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(**wrong)
