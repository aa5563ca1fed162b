"""Initial weights from (seed, parameter name) alone: the same on every device, in every dtype, under every sharding.

Normal numbers are drawn by their position: number i of a stream is drawn without those before it, and the same
everywhere. Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; numpy promises its stream
not to change) turns a key and a counter into uniform bits, 32 for each number. The inverse of the normal distribution
is then read from a table and interpolated. That takes nothing but additions and multiplications, which IEEE 754 rounds
in one way only: a logarithm or cosine, which other methods need, differs between processors in its last bit.
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
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor


def parameter_seed(seed: int, name: str) -> int:
    """A 63-bit seed for one parameter; equal in every process and version of Python, unlike `hash`."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@torch.no_grad()
def fill_normal(parameter: Tensor, *, name: str, seed: int, std: float) -> None:
    """Fills `parameter` in place with N(0, std^2), drawn in float32 on the CPU; of a sharded one only this rank's part.

    Element i of the full tensor, counted row by row, is number i of the stream of (seed, name).
    """
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    starts, length = contiguous_runs(tuple(parameter.shape), local_indices(parameter))
    drawn = np.empty(local.numel(), dtype=np.float32)
    fill_runs(drawn, starts, length, key=parameter_seed(seed, name), std=std, threads=torch.get_num_threads())
    local.copy_(torch.from_numpy(drawn).view(local.shape))


def local_indices(parameter: Tensor) -> list[np.ndarray | None]:
    """Of each dimension the indices that this rank holds, or None for all of them; a part of a tensor is their product.

    Placements are applied to each dimension alone, so that any nesting of shards comes out as DTensor makes it.
    """
    indices: list[np.ndarray | None] = [None] * parameter.dim()
    if isinstance(parameter, DTensor):
        for dimension, size in enumerate(parameter.shape):
            own = [_along_first(p) if _shards(p, dimension) else Replicate() for p in parameter.placements]
            if not all(isinstance(placement, Replicate) for placement in own):
                whole = torch.arange(size)
                part = distribute_tensor(whole, parameter.device_mesh, own, src_data_rank=None).to_local()
                indices[dimension] = part.cpu().numpy()
    return indices


def _shards(placement: Placement, dimension: int) -> bool:
    return getattr(placement, "dim", None) == dimension


def _along_first(placement: Any) -> Placement:
    """The same cut of a tensor's first dimension. FSDP notes in its own kind of shard how often it cuts those of TP."""
    factor = getattr(placement, "split_factor", None)
    cut: Placement = Shard(0) if factor is None else type(placement)(0, split_factor=factor)
    return cut


def contiguous_runs(shape: tuple[int, ...], indices: Sequence[np.ndarray | None]) -> tuple[np.ndarray, int]:
    """Where the elements at `indices` lie in a tensor of `shape`, row by row: the starts of runs, and their length."""
    starts, length = np.zeros(1, dtype=np.int64), 1
    for dimension in reversed(range(len(shape))):
        own, stride = indices[dimension], math.prod(shape[dimension + 1 :])
        if own is None:
            own = np.arange(shape[dimension])
        # What follows is whole, and these are neighbours: they make one run.
        if length == stride and len(starts) == 1 and len(own) and own[-1] - own[0] == len(own) - 1:
            starts, length = starts + own[0] * stride, length * len(own)
        else:
            starts = (own[:, None] * stride + starts[None, :]).reshape(-1)
    return starts, length


@torch.no_grad()
def copy_sharded(parameter: Tensor, full: Tensor) -> None:
    """Copies a full CPU tensor into a parameter of any sharding, device and dtype; no communication."""
    if isinstance(parameter, DTensor):
        # src_data_rank=None: every rank cuts its own share out of its own, equal, full tensor
        share = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(share.to_local())
    else:
        parameter.copy_(full)


_PER_COUNT = 8
"""Numbers of one count of Philox: four words of 64 bits, two numbers each."""
_PIECE = 2**14
"""Numbers drawn at a time: the arrays of one piece stay in a processor's cache."""
_SEGMENT_BITS = 17
"""Low bits of a float32 that say where in a segment of the table it lies; the 6 above and the exponent say in which."""


def fill_runs(out: np.ndarray, starts: np.ndarray, length: int, *, key: int, std: float, threads: int = 1) -> None:
    """Fill `out` (runs * length,) float32 with numbers starts[r] to starts[r] + length of the stream `key`, run after
    run, times `std`. `starts` increases.
    """
    factor = np.float32(std)

    def draw(piece: tuple[int, np.ndarray, int]) -> None:
        first, begins, count = piece
        numbers = normal_from_bits(_random_bits(key, begins, count))
        np.multiply(numbers, factor, out=out[first : first + len(numbers)])

    pieces = _pieces(starts, length)
    if threads == 1 or len(out) <= _PIECE:
        for piece in pieces:
            draw(piece)
        return
    with ThreadPoolExecutor(threads) as pool:  # numpy leaves the interpreter's lock in every operation but Philox
        for _ in pool.map(draw, pieces):
            pass


def _pieces(starts: np.ndarray, length: int) -> Iterator[tuple[int, np.ndarray, int]]:
    """(place in the output, first numbers, count each): a part of one long run, or several short runs."""
    if length > _PIECE:
        for run, start in enumerate(starts):
            for done in range(0, length, _PIECE):
                yield run * length + done, np.array([start + done]), min(_PIECE, length - done)
    elif length:
        together = _PIECE // length
        for run in range(0, len(starts), together):
            yield run * length, starts[run : run + together], length


def _random_bits(key: int, starts: np.ndarray, length: int) -> np.ndarray:
    """(runs * length,) uint32"""
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
    """(n,) float32 normal numbers, of mean 0 and variance 1, from (n,) uint32 uniform ones; at most 6.23."""
    constant, linear, square = _table()
    # 31 bits are u * 2**32, an odd number, of a u below 1/2; its float32 says where it is on a logarithmic scale
    u = ((bits & np.uint32(2**31 - 1)) | np.uint32(1)).view(np.int32).astype(np.float32)
    code = u.view(np.int32)
    segment = (code >> _SEGMENT_BITS).astype(np.intp)
    t = (code & np.int32(2**_SEGMENT_BITS - 1)).astype(np.float32)
    numbers: np.ndarray = square.take(segment, mode="clip")  # half the time of plain indexing
    numbers *= t
    numbers += linear.take(segment, mode="clip")
    numbers *= t
    numbers += constant.take(segment, mode="clip")
    signs = numbers.view(np.uint32)
    signs ^= bits & np.uint32(2**31)  # the last bit: which half of the distribution
    return numbers


@lru_cache(maxsize=1)
def _table() -> np.ndarray:
    """(3, segments) float32: a parabola for each segment of the inverse of the normal distribution below 1/2.

    Segments are of 64 to a factor of two, so that they are as fine in the tail as in the middle. The parabolas meet the
    inverse at their ends and their middle, and are nowhere more than 1e-6 away from it.
    """
    inverse = NormalDist().inv_cdf
    edge = 2**_SEGMENT_BITS
    first, last = (int(np.float32(u).view(np.int32)) >> _SEGMENT_BITS for u in (1.0, 2.0**31))
    codes = (np.arange(2 * first, 2 * last + 3) * (edge // 2)).astype(np.int32)  # ends and middles
    u = codes.view(np.float32).astype(np.float64) / 2.0**32
    at = np.array([inverse(min(x, 0.5)) for x in u])  # what is above 1/2 is not used
    begin, middle, end = at[0:-2:2], at[1:-1:2], at[2::2]
    table = np.zeros((3, last + 1), dtype=np.float32)
    table[0, first:] = begin
    table[1, first:] = (4 * middle - 3 * begin - end) / edge
    table[2, first:] = (2 * begin - 4 * middle + 2 * end) / edge**2
    return table


def materialize(model: nn.Module, device: torch.device) -> None:
    """`to_empty` on `device`, and a parameter that modules share stays one: torch makes one for each of them."""
    uses: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            uses.setdefault(id(parameter), []).append((module, name))
    model.to_empty(device=device)
    for (owner, own_name), *others in uses.values():
        for module, name in others:
            module.register_parameter(name, owner.get_parameter(own_name))
