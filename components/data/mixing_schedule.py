"""The source of each sample of a mixture: a pure function of its number, with exact proportions at every prefix.

With integer weights W_i of sum P, the first n samples contain n W_i / P samples of source i, with an error below one
sample, for every n and i. This is the chairman assignment problem (Tijdeman 1980, Discrete Mathematics 32), solved as
proportionate scheduling of one processor (Baruah et al. 1996, "Proportionate progress"): sample j of source i is
scheduled in the slots [floor((j-1) P / W_i), ceil(j P / W_i)), earliest deadline first. After P samples all counts are
exact, so the schedule repeats, and a table of one period determines the source of every sample.
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
"""Enough for weights with five decimals; the table of a period takes 12 bytes per sample."""


def integer_weights(weights: Mapping[str, float]) -> dict[str, int]:
    """Return the smallest integers in the proportion of `weights`, whose decimal notation is taken as exact.

    Raises InputError for weights that are negative, not finite or all zero, and for a sum above MAX_PERIOD.
    """
    if wrong := [name for name, weight in weights.items() if not 0 <= weight < float("inf")]:
        raise InputError("weights", f"{wrong[0]} = {weights[wrong[0]]}; expected a number >= 0")
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
    total = sum(exact.values())
    if not total:
        raise InputError("weights", "no weight is above 0; expected at least one")
    scale = lcm(*(weight.denominator for weight in exact.values()))
    whole = {name: int(weight * scale) for name, weight in exact.items()}
    divisor = gcd(*whole.values())
    whole = {name: weight // divisor for name, weight in whole.items()}
    if (period := sum(whole.values())) > MAX_PERIOD:
        rounded = ", ".join(f"{name} = {round(float(weight / total), 4)}" for name, weight in exact.items())
        raise InputError(
            "weights",
            f"as integers they sum to {period:,}, at most {MAX_PERIOD:,} is supported; "
            f"round them, for example to {rounded}",
        )
    return whole


class MixingSchedule:
    """Maps sample numbers to (source, index within the samples of that source), for fixed weights."""

    def __init__(self, weights: Sequence[int]):
        """`weights` are integers >= 0, and not all 0."""
        self.weights = np.array(weights, dtype=np.int64)
        self.period = int(self.weights.sum())
        self._sources = np.array(_schedule(weights), dtype=np.int32)
        self._before = np.empty(self.period, dtype=np.int64)
        for source in range(len(weights)):
            places = np.flatnonzero(self._sources == source)
            self._before[places] = np.arange(len(places))  # earlier samples of the source in this period

    def __call__(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Map (n,) sample numbers from 0 to (n,) int32 sources and (n,) int64 indices within the source."""
        rounds, places = np.divmod(samples, self.period)
        sources = self._sources[places]
        # a period contains exactly weights[i] samples of source i
        return sources, rounds * self.weights[sources] + self._before[places]

    def counts(self, samples: int) -> np.ndarray:
        """Return (sources,) int64: the samples of each source among the first `samples`."""
        rounds, rest = divmod(samples, self.period)
        return rounds * self.weights + np.bincount(self._sources[:rest], minlength=len(self.weights))


class StagedMixingSchedule:
    """Mixing schedules of successive stages; each source continues where the previous stage ended."""

    def __init__(self, stages: Sequence[tuple[int, Sequence[int]]]):
        """`stages` are (first sample, weights) in increasing order of the first sample, from 0."""
        self._starts = np.array([start for start, _ in stages], dtype=np.int64)
        self._stages = [MixingSchedule(weights) for _, weights in stages]
        lengths = [later - earlier for earlier, later in pairwise(self._starts.tolist())]
        nothing = np.zeros(len(stages[0][1]), dtype=np.int64)
        added = (stage.counts(length) for stage, length in zip(self._stages, lengths, strict=False))
        self._before = list(accumulate(added, initial=nothing))  # samples of each source before each stage

    def __call__(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the same as `MixingSchedule`, over all stages."""
        stages = np.searchsorted(self._starts, samples, side="right") - 1
        sources, numbers = np.empty(len(samples), dtype=np.int32), np.empty(len(samples), dtype=np.int64)
        for stage in np.unique(stages):
            here = stages == stage
            sources[here], within = self._stages[stage](samples[here] - self._starts[stage])
            numbers[here] = within + self._before[stage][sources[here]]
        return sources, numbers

    def counts(self, samples: int) -> np.ndarray:
        """Return the same as `MixingSchedule.counts`, over all stages."""
        stage = int(np.searchsorted(self._starts, samples, side="right")) - 1
        return self._before[stage] + self._stages[stage].counts(samples - int(self._starts[stage]))


def _schedule(weights: Sequence[int]) -> list[int]:
    """Return the source of each slot of one period."""
    period = sum(weights)
    unreleased = [(0, source, 1) for source, weight in enumerate(weights) if weight]  # (release, source, j)
    ready: list[tuple[int, int, int]] = []  # (deadline, source, j)
    order = []
    for slot in range(period):
        while unreleased and unreleased[0][0] <= slot:  # the window of sample j of the source starts
            _, source, j = heapq.heappop(unreleased)
            heapq.heappush(ready, (-(-j * period // weights[source]), source, j))  # deadline: ceil(j P / W_i)
        _, source, j = heapq.heappop(ready)  # earliest deadline first
        order.append(source)
        heapq.heappush(unreleased, (j * period // weights[source], source, j + 1))  # release: floor(j P / W_i)
    return order
