"""Numbers by their position: the same however they are asked for, and normal."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from models.init import fill_runs, normal_from_bits, parameter_seed

pytestmark = pytest.mark.quick
N = 2**20


def draw(starts: list[int], length: int, *, key: int = 7, std: float = 1.0, threads: int = 1) -> np.ndarray:
    out = np.empty(len(starts) * length, dtype=np.float32)
    fill_runs(out, np.array(starts), length, key=key, std=std, threads=threads)
    return out


@pytest.fixture(scope="module")
def numbers() -> np.ndarray:
    return draw([0], N)


def test_a_number_depends_on_its_position_alone(numbers: np.ndarray) -> None:
    for start in (0, 1, 7, 8, 9, 16_383, 16_384, 100_003):
        for length in (1, 2, 15, 40_000):
            assert np.array_equal(draw([start], length), numbers[start : start + length]), (start, length)
    rows = [3, 50, 99, 20_000, 90_000]
    for length in (1, 13, 30_000):
        expected = np.concatenate([numbers[row : row + length] for row in rows])
        assert np.array_equal(draw(rows, length), expected), length
    assert np.array_equal(draw([0], N, threads=3), numbers)
    assert np.array_equal(draw([2**40], 50), draw([2**40 - 5], 55)[5:]), "positions of the largest tensors, too"
    assert np.array_equal(draw([0], 1000, std=0.02), numbers[:1000] * np.float32(0.02))
    assert draw([], 5).size == draw([0], 0).size == 0


def test_the_bits_become_the_inverse_of_the_normal_distribution() -> None:
    middle = np.random.default_rng(0).integers(1, 2**31, 20_000)
    below = np.unique([*range(1, 3_000), *(2**31 - np.arange(1, 3_000)), *(2 ** np.arange(31)), *middle])
    found = normal_from_bits(below.astype(np.uint32))
    expected = [NormalDist().inv_cdf((int(bits) | 1) / 2**32) for bits in below]
    assert np.abs(found - np.array(expected)).max() < 1e-6
    assert np.array_equal(normal_from_bits((below + 2**31).astype(np.uint32)), -found), "one bit is the sign"
    assert found.min() == pytest.approx(-6.23, abs=0.01)


def test_mean_moments_and_distribution_are_those_of_the_normal(numbers: np.ndarray) -> None:
    z = np.sort(numbers.astype(np.float64))
    assert abs(z.mean()) < 4 / math.sqrt(N)
    assert abs((z**2).mean() - 1) < 4 * math.sqrt(2 / N)
    assert abs((z**3).mean()) < 4 * math.sqrt(15 / N)
    assert abs((z**4).mean() - 3) < 4 * math.sqrt(96 / N)
    # Kolmogorov-Smirnov at some points; 1.95 / sqrt(N) is passed by one sample in a thousand
    points = np.linspace(-5, 5, 1001)
    expected = np.array([NormalDist().cdf(point) for point in points])
    assert np.abs(np.searchsorted(z, points) / N - expected).max() < 1.95 / math.sqrt(N)
    for sigma in (3, 4):
        tail = 2 * NormalDist().cdf(-sigma) * N
        assert abs((np.abs(z) > sigma).sum() - tail) < 4 * math.sqrt(tail), sigma


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """In standard errors."""
    return float((a.astype(np.float64) * b).mean() * math.sqrt(len(a)))


def test_neighbors_are_independent(numbers: np.ndarray) -> None:
    for lag in (1, 2, 3, 4, 7, 8, 16, 64, 1024, 4096):
        assert abs(correlation(numbers[:-lag], numbers[lag:])) < 4, lag
        # of the sizes too, which numbers that are made in pairs can share
        sizes = (np.square(numbers, dtype=np.float64) - 1) / math.sqrt(2)
        assert abs(correlation(sizes[:-lag], sizes[lag:])) < 4, lag


def test_streams_of_other_names_and_seeds_are_independent(numbers: np.ndarray) -> None:
    names = [
        (0, "layers.0.attention.wq.weight"),
        (0, "layers.1.attention.wq.weight"),
        (1, "layers.0.attention.wq.weight"),
    ]
    streams = [draw([0], N // 4, key=parameter_seed(seed, name)) for seed, name in names]
    streams.append(draw([0], N // 4, key=parameter_seed(*names[0]) + 1))  # a key that differs in one bit or few
    for i, first in enumerate(streams):
        for second in streams[i + 1 :]:
            assert not np.intersect1d(first[:64], second[:64]).size
            assert abs(correlation(first, second)) < 4
            assert abs(correlation(first[1:], second[:-1])) < 4
