"""The global order of samples: a pure function of (seed, epoch, index), in constant memory.

Global sample s is sample s mod n of epoch s div n; each epoch has another pseudo-random order of the n sequences. The
order does not depend on ranks, workers, micro-batches or batch sizes. It is computed, not stored, so the sequence at
any position of a run of any length is available in constant time.
"""

from __future__ import annotations

from math import isqrt

import numpy as np

_ROUNDS = 10
"""With fewer rounds, orders of a few samples are visibly biased: neighbors stay neighbors too often."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = 2**64 - 1


class SampleOrder:
    """Maps global sample numbers to (epoch, index), identical on every machine: it uses only 64-bit integers."""

    def __init__(self, length: int, *, seed: int):
        """`length` is the number of sequences in the data, at least 1."""
        if length < 1:
            raise ValueError(f"the dataset has {length} samples; it needs at least 1")
        self.length = length
        # Index x is the point (i, j) with x = b*i + j of a nearly square rectangle a x b with a*b >= length.
        a = isqrt(length - 1) + 1
        self._sides = np.uint64(a), np.uint64(-(-length // a))
        self._key = _mix(np.array([seed & _MASK], dtype=np.uint64))

    def __call__(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Map (n,) global sample numbers from 0 to (n,) epochs and (n,) indices below `length`, both int64."""
        samples = np.asarray(samples, dtype=np.int64)
        epochs, indices = np.divmod(samples, self.length)
        return epochs, self._permute(indices.astype(np.uint64), epochs.astype(np.uint64)).astype(np.int64)

    def _permute(self, indices: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """Return the images (n,) uint64 of `indices` under a permutation of [0, length) for each epoch.

        A permutation of the rectangle is applied until the result is below `length`, which gives a permutation of
        [0, length) (cycle walking; Black & Rogaway 2002, "Ciphers with arbitrary finite domains").
        """
        keys = _mix(self._key + epochs)
        permuted = self._permute_rectangle(indices, keys)
        while (outside := permuted >= np.uint64(self.length)).any():
            permuted[outside] = self._permute_rectangle(permuted[outside], keys[outside])
        return permuted

    def _permute_rectangle(self, numbers: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Permute x = b*i + j by a Feistel network: each round shifts i by a hash of j or j by a hash of i, and is
        therefore invertible."""
        a, b = self._sides
        i, j = numbers // b, numbers % b
        for turn in range(_ROUNDS):
            round_keys = _mix(keys + np.uint64(turn))
            if turn % 2 == 0:
                i = (i + _mix(round_keys ^ (j * _GOLDEN)) % a) % a
            else:
                j = (j + _mix(round_keys ^ (i * _GOLDEN)) % b) % b
        return i * b + j


def _mix(x: np.ndarray) -> np.ndarray:
    """Apply the output function of SplitMix64 (Steele, Lea & Flood 2014) to (n,) uint64."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
