"""Which source each sample of a mixture comes from: a pure function of its number, exact at every prefix.

With integer weights W_i of sum P, the first n samples hold n W_i / P of source i, up to less than one sample, for every
n and i at once. That is the chairman assignment problem (Tijdeman 1980, Discrete Mathematics 32); it is solved here as
what it also is, a fair schedule of one processor (Baruah et al. 1996, "Proportionate progress"): the j-th sample of
source i lies in the slots [floor((j-1) P / W_i), ceil(j P / W_i)), and the earliest deadline goes first. After P
samples every count is exact, so the pattern repeats, and a table of one period answers for any sample.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import accumulate, pairwise
from math import gcd, lcm

import numpy as np

from components.errors import InputError

MAX_PERIOD = 100_000
"""Weights of five decimals fit; the table of a period takes 12 bytes a sample."""


def integer_weights(weights: Mapping[str, float]) -> dict[str, int]:
    """The smallest whole numbers in the proportion of `weights`, taken as the decimals that were written.

    Raises ValueError for weights that are negative, not finite, all zero, or whose proportion needs larger numbers.
    """
    if wrong := [name for name, weight in weights.items() if not 0 <= weight < float("inf")]:
        raise InputError("weights", f"{wrong[0]} = {weights[wrong[0]]}; expected a number of at least 0")
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
    total = sum(exact.values())
    if not total:
        raise InputError("weights", "all are zero, or there are none")
    scale = lcm(*(weight.denominator for weight in exact.values()))
    whole = {name: int(weight * scale) for name, weight in exact.items()}
    divisor = gcd(*whole.values())
    whole = {name: weight // divisor for name, weight in whole.items()}
    if (period := sum(whole.values())) > MAX_PERIOD:
        rounded = ", ".join(f"{name} = {round(float(weight / total), 4)}" for name, weight in exact.items())
        raise InputError(
            "weights",
            f"their proportion repeats only after {period:,} samples, at most {MAX_PERIOD:,} can be; "
            f"round them, for example to {rounded}",
        )
    return whole


class MixingSchedule:
    """Sample number -> (source, how many samples of that source came before), for one set of weights."""

    def __init__(self, weights: Sequence[int]):
        """`weights` are whole, at least 0, and not all 0."""
        self.weights = np.array(weights, dtype=np.int64)
        self.period = int(self.weights.sum())
        self._sources = np.array(_schedule(weights), dtype=np.int32)
        self._before = np.empty(self.period, dtype=np.int64)
        for source in range(len(weights)):
            places = np.flatnonzero(self._sources == source)
            self._before[places] = np.arange(len(places))

    def __call__(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) sample numbers from 0 -> (n,) sources, (n,) numbers within the source; int32 and int64."""
        rounds, places = np.divmod(samples, self.period)
        sources = self._sources[places]
        return sources, rounds * self.weights[sources] + self._before[places]

    def counts(self, samples: int) -> np.ndarray:
        """(sources,) int64: samples of each source among the first `samples`."""
        rounds, rest = divmod(samples, self.period)
        return rounds * self.weights + np.bincount(self._sources[:rest], minlength=len(self.weights))


class StagedMixingSchedule:
    """Interleavings that follow one another at given samples; each source goes on where the stage before left it."""

    def __init__(self, stages: Sequence[tuple[int, Sequence[int]]]):
        """(first sample, weights) of each stage; the first starts at 0, and starts increase."""
        self._starts = np.array([start for start, _ in stages], dtype=np.int64)
        self._stages = [MixingSchedule(weights) for _, weights in stages]
        lengths = [later - earlier for earlier, later in pairwise(self._starts.tolist())]
        nothing = np.zeros(len(stages[0][1]), dtype=np.int64)
        gained = (stage.counts(length) for stage, length in zip(self._stages, lengths, strict=False))
        self._before = list(accumulate(gained, initial=nothing))  # samples of each source before each stage

    def __call__(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `Interleaving`, for the whole course of stages."""
        stages = np.searchsorted(self._starts, samples, side="right") - 1
        sources, numbers = np.empty(len(samples), dtype=np.int32), np.empty(len(samples), dtype=np.int64)
        for stage in np.unique(stages):
            here = stages == stage
            sources[here], within = self._stages[stage](samples[here] - self._starts[stage])
            numbers[here] = within + self._before[stage][sources[here]]
        return sources, numbers

    def counts(self, samples: int) -> np.ndarray:
        """As `Interleaving.counts`."""
        stage = int(np.searchsorted(self._starts, samples, side="right")) - 1
        return self._before[stage] + self._stages[stage].counts(samples - int(self._starts[stage]))


def _schedule(weights: Sequence[int]) -> list[int]:
    """The source of each slot of one period."""
    period = sum(weights)
    waiting = [(0, source, 1) for source, weight in enumerate(weights) if weight]  # (release, source, j)
    ready: list[tuple[int, int, int]] = []  # (deadline, source, j)
    order = []
    for slot in range(period):
        while waiting and waiting[0][0] <= slot:
            _, source, j = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-j * period // weights[source]), source, j))
        _, source, j = heapq.heappop(ready)
        order.append(source)
        heapq.heappush(waiting, (j * period // weights[source], source, j + 1))
    return order
