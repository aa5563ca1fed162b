"""Random weights from (seed, parameter name) alone: equal on every device, in every dtype, with every sharding.

The distribution of each matrix is chosen elsewhere: `Decoder.initial_std` in decoder.py, and RULES in mup.py.

Normal numbers are indexed by position: number i of a stream can be computed without those before it. Philox4x64-10
(Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; numpy guarantees that its stream does not change)
turns a key and a counter into uniform bits, 32 for each number. The inverse of the normal distribution is then
interpolated from a table, with additions and multiplications only, which IEEE 754 defines exactly. Logarithms and
cosines, which other methods need, differ between processors in the last bit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor


def parameter_seed(seed: int, name: str) -> int:
    """Return a 63-bit seed for one parameter; unlike `hash`, it is equal in every process and version of Python."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@torch.no_grad()
def fill_normal(parameter: Tensor, *, name: str, seed: int, std: float) -> None:
    """Fill `parameter` in place with N(0, std^2), drawn in float32 on the CPU; of a DTensor only this rank's shard.

    Element i of the full tensor, in row-major order, is number i of the stream of (seed, name).
    """
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    starts, length = contiguous_runs(tuple(parameter.shape), local_indices(parameter))
    drawn = np.empty(local.numel(), dtype=np.float32)
    fill_runs(drawn, starts, length, key=parameter_seed(seed, name), std=std, threads=torch.get_num_threads())
    local.copy_(torch.from_numpy(drawn).view(local.shape))


def local_indices(parameter: Tensor) -> list[np.ndarray | None]:
    """Return, for each dimension, the indices that this rank holds, or None for all. The shard is their product.

    The indices come from distributing arange along each dimension, so nested shards are exactly those of DTensor.
    """
    indices: list[np.ndarray | None] = [None] * parameter.dim()
    if isinstance(parameter, DTensor):
        for dimension, size in enumerate(parameter.shape):
            placements = [_as_dim_0(p) if _shards(p, dimension) else Replicate() for p in parameter.placements]
            if not all(isinstance(placement, Replicate) for placement in placements):
                full = torch.arange(size)
                local = distribute_tensor(full, parameter.device_mesh, placements, src_data_rank=None).to_local()
                indices[dimension] = local.cpu().numpy()
    return indices


def _shards(placement: Placement, dimension: int) -> bool:
    return getattr(placement, "dim", None) == dimension


def _as_dim_0(placement: Any) -> Placement:
    """Return the same placement for dimension 0. FSDP2's `_StridedShard` has a split factor, which must be kept."""
    factor = getattr(placement, "split_factor", None)
    shard: Placement = Shard(0) if factor is None else type(placement)(0, split_factor=factor)
    return shard


def contiguous_runs(shape: tuple[int, ...], indices: Sequence[np.ndarray | None]) -> tuple[np.ndarray, int]:
    """Return the flat offsets of the contiguous runs of the elements at `indices`, and the length of a run."""
    starts, length = np.zeros(1, dtype=np.int64), 1
    for dimension in reversed(range(len(shape))):
        held, stride = indices[dimension], math.prod(shape[dimension + 1 :])
        if held is None:
            held = np.arange(shape[dimension])
        # The dimensions after this one are complete and the indices are consecutive, so they extend the one run.
        if length == stride and len(starts) == 1 and len(held) and held[-1] - held[0] == len(held) - 1:
            starts, length = starts + held[0] * stride, length * len(held)
        else:
            starts = (held[:, None] * stride + starts[None, :]).reshape(-1)
    return starts, length


_PER_COUNT = 8
"""Numbers per Philox counter: four 64-bit words of two numbers each."""
_CHUNK = 2**14
"""Numbers drawn at a time, so that the temporary arrays stay in the CPU cache."""
_SEGMENT_BITS = 17
"""Low mantissa bits of a float32 that are the position within a table segment. The 6 bits above and the exponent are
the index of the segment."""


def fill_runs(out: np.ndarray, starts: np.ndarray, length: int, *, key: int, std: float, threads: int = 1) -> None:
    """Fill `out`, (runs * length,) float32, with `std` times the numbers of the stream `key`.

    Run r has the numbers from starts[r] to starts[r] + length. `starts` is increasing.
    """
    factor = np.float32(std)

    def draw(chunk: tuple[int, np.ndarray, int]) -> None:
        first, begins, count = chunk
        numbers = normal_from_bits(_random_bits(key, begins, count))
        np.multiply(numbers, factor, out=out[first : first + len(numbers)])

    chunks = _chunks(starts, length)
    if threads == 1 or len(out) <= _CHUNK:
        for chunk in chunks:
            draw(chunk)
        return
    with ThreadPoolExecutor(threads) as pool:  # numpy releases the GIL in all of these operations except Philox
        for _ in pool.map(draw, chunks):
            pass


def _chunks(starts: np.ndarray, length: int) -> Iterator[tuple[int, np.ndarray, int]]:
    """Yield (offset in the output, starts, length): a part of one long run, or several short runs."""
    if length > _CHUNK:
        for run, start in enumerate(starts):
            for done in range(0, length, _CHUNK):
                yield run * length + done, np.array([start + done]), min(_CHUNK, length - done)
    elif length:
        runs_per_chunk = _CHUNK // length
        for run in range(0, len(starts), runs_per_chunk):
            yield run * length, starts[run : run + runs_per_chunk], length


def _random_bits(key: int, starts: np.ndarray, length: int) -> np.ndarray:
    """Return the uniform bits of the numbers of all runs, (runs * length,) uint32."""
    bits = np.empty((len(starts), length), dtype=np.uint32)
    generator, count = np.random.Philox(key=key, counter=int(starts[0]) // _PER_COUNT), 0
    for row, start in zip(bits, starts.tolist(), strict=True):
        first, skipped = divmod(start, _PER_COUNT)
        first -= int(starts[0]) // _PER_COUNT
        generator.advance(first - count)
        words = -(-(skipped + length) // 2)
        count = first + -(-words // 4)
        row[:] = generator.random_raw(words).astype("<u8", copy=False).view("<u4")[skipped : skipped + length]
    return bits.reshape(-1)


def normal_from_bits(bits: np.ndarray) -> np.ndarray:
    """Return standard normal numbers (n,) float32 from uniform bits (n,) uint32; their largest magnitude is 6.23."""
    constant, linear, square = _table()
    # 31 bits, made odd, are u * 2**32 for u in (0, 1/2); the bits of its float32 are a position on a logarithmic scale
    u = ((bits & np.uint32(2**31 - 1)) | np.uint32(1)).view(np.int32).astype(np.float32)
    code = u.view(np.int32)
    segment = (code >> _SEGMENT_BITS).astype(np.intp)
    t = (code & np.int32(2**_SEGMENT_BITS - 1)).astype(np.float32)
    numbers: np.ndarray = square.take(segment, mode="clip")  # take() needs half the time of plain indexing
    numbers *= t
    numbers += linear.take(segment, mode="clip")
    numbers *= t
    numbers += constant.take(segment, mode="clip")
    signs = numbers.view(np.uint32)
    signs ^= bits & np.uint32(2**31)  # the highest bit is the sign: the half of the distribution
    return numbers


@lru_cache(maxsize=1)
def _table() -> np.ndarray:
    """Return the coefficients, (3, segments) float32, of a parabola for each segment of the inverse normal CDF below
    1/2.

    There are 64 segments per factor of two, so that the tail is resolved as well as the middle. Each parabola equals
    the inverse at both ends and the middle of its segment; the error is below 1e-6 everywhere.
    """
    inverse = NormalDist().inv_cdf
    edge = 2**_SEGMENT_BITS
    first, last = (int(np.float32(u).view(np.int32)) >> _SEGMENT_BITS for u in (1.0, 2.0**31))
    codes = (np.arange(2 * first, 2 * last + 3) * (edge // 2)).astype(np.int32)  # ends and middles of the segments
    u = codes.view(np.float32).astype(np.float64) / 2.0**32
    at = np.array([inverse(min(x, 0.5)) for x in u])  # values above 1/2 are not used
    begin, middle, end = at[0:-2:2], at[1:-1:2], at[2::2]
    table = np.zeros((3, last + 1), dtype=np.float32)
    table[0, first:] = begin
    table[1, first:] = (4 * middle - 3 * begin - end) / edge
    table[2, first:] = (2 * begin - 4 * middle + 2 * end) / edge**2
    return table
