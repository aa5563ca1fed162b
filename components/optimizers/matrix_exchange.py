"""Exchange sharded matrices, so that every process updates a part of the matrices, each as a whole.

A `Unit` is a stack of whole matrices of one parameter, with one owner among all processes, replicas and TP ranks
included. `MatrixExchange.gather` sends its shards to the owner, and `scatter` sends its update back to every process
that holds a shard. Both are one all-to-all for many units. A process may own no unit, or hold an empty shard: it then
sends or receives nothing.

Parameters are seen as (E, R, C): E matrices of R rows and C columns, E = 1 for a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Box = tuple[tuple[int, int], ...]
"""(first, end) along each of the dimensions E, R, C."""


@dataclass(frozen=True)
class Sharding:
    """Which part of a parameter each process holds."""

    shape: tuple[int, int, int]
    boxes: list[Box]
    """The shard of each process, by rank."""
    replicas: list[tuple[int, ...]]
    """The coordinates of each process along the mesh dimensions of which every process holds the same shard."""

    def sends_to(self, source: int, owner: int) -> bool:
        """Return whether `owner` takes the shard of `source`, and not an equal one of another replica."""
        return self.replicas[source] == self.replicas[owner]


@dataclass(frozen=True)
class Unit:
    """Whole matrices of one parameter that one process updates."""

    parameter: int
    """Index of the parameter."""
    box: Box
    owner: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(end - first for first, end in self.box)


def sharding_of(parameter: Tensor) -> Sharding:
    """Return the sharding of a matrix or of a stack of matrices; of a plain tensor the one process holds all."""
    rows, columns = parameter.shape[-2:]
    shape = (parameter.shape[0] if parameter.ndim == 3 else 1, rows, columns)
    whole: Box = tuple((0, size) for size in shape)
    mesh: Any = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return Sharding(shape, [whole], [()])
    if mesh.size() != dist.get_world_size():
        raise ValueError(f"a parameter is sharded over {mesh.size()} of {dist.get_world_size()} processes")
    placements = parameter.placements  # type: ignore[attr-defined]
    places = product(*map(range, mesh.shape))
    coordinates = {int(rank): place for place, rank in zip(places, mesh.mesh.flatten(), strict=True)}
    first_dim = 3 - parameter.ndim
    boxes, replicas = [], []
    for rank in range(mesh.size()):
        boxes.append(_shard_box(whole, placements, mesh.shape, coordinates[rank], first_dim))
        replicas.append(tuple(c for c, p in zip(coordinates[rank], placements, strict=True) if p.is_replicate()))
    return Sharding(shape, boxes, replicas)


def _shard_box(
    whole: Box, placements: Sequence[Any], sizes: Sequence[int], coordinate: Sequence[int], first_dim: int
) -> Box:
    """Return the shard at `coordinate`, in chunks of equal size except for the last ones, as torch.chunk makes them."""
    box = list(whole)
    # FSDP2 shards what is already a TP shard; a placement with a split_factor says so for the same tensor dimension
    for index in sorted(range(len(placements)), key=lambda index: hasattr(placements[index], "split_factor")):
        dim = getattr(placements[index], "dim", None)
        if dim is not None:
            first, end = box[dim + first_dim]
            chunk = -(-(end - first) // sizes[index])
            first = min(first + chunk * coordinate[index], end)
            box[dim + first_dim] = (first, min(first + chunk, end))
    return tuple(box)


def assign_units(shardings: Sequence[Sharding], cost: Callable[[int], float], world_size: int) -> list[Unit]:
    """Divide parameters into units, and assign each to the process with the least work so far.

    `cost` returns that of one matrix of a parameter, by its index. Where a process holds a unit as a whole, one of
    these owns it, which spares sending its shards. The result is the same on every process.
    """
    units = []
    load = [0.0] * world_size
    for index, sharding in enumerate(shardings):
        experts, rows, columns = sharding.shape
        cuts = {0, experts}
        for box in sharding.boxes:
            cuts |= set(box[0])
        if cuts == {0, experts}:  # not sharded by expert
            cuts |= set(range(0, experts, -(-experts // world_size)))
        ordered = sorted(cuts)
        for first, end in pairwise(ordered):
            unit: Box = ((first, end), (0, rows), (0, columns))
            holders = [rank for rank in range(world_size) if overlap(sharding.boxes[rank], unit) == unit]
            owner = min(holders or range(world_size), key=load.__getitem__)
            load[owner] += (end - first) * cost(index)
            units.append(Unit(index, unit, owner))
    return units


def overlap(a: Box, b: Box) -> Box | None:
    """Return the common part of two boxes; None if it is empty."""
    common = tuple((max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b, strict=True))
    return common if all(first < end for first, end in common) else None


@dataclass(frozen=True)
class _Piece:
    """A part of a tensor, by the index of the tensor and its slices."""

    tensor: int
    slices: tuple[slice, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @staticmethod
    def of(tensor: int, box: Box, within: Box) -> _Piece:
        """Return the part `box` of the tensor that holds `within`."""
        slices = tuple(slice(b[0] - w[0], b[1] - w[0]) for b, w in zip(box, within, strict=True))
        return _Piece(tensor, slices, tuple(end - first for first, end in box))


class MatrixExchange:
    """The pieces that this process sends and receives for some units of some parameters."""

    def __init__(self, units: Sequence[Unit], shardings: Sequence[Sharding], rank: int, world_size: int) -> None:
        """`units` name their parameters by the index in `shardings`."""
        self.owned = [unit for unit in units if unit.owner == rank]
        """The units of this process, in the order of the tensors that `gather` fills and `scatter` takes."""
        self._multiprocess = world_size > 1
        ranks = range(world_size)
        number = {id(unit): index for index, unit in enumerate(self.owned)}
        # by process, what it sends to the owners and what the owners send to it
        self._shards_out: list[list[_Piece]] = [[] for _ in ranks]
        self._shards_in: list[list[_Piece]] = [[] for _ in ranks]
        self._units_out: list[list[_Piece]] = [[] for _ in ranks]
        self._units_in: list[list[_Piece]] = [[] for _ in ranks]
        for unit in units:
            sharding = shardings[unit.parameter]
            own = sharding.boxes[rank]
            if (part := overlap(own, unit.box)) is not None:
                piece = _Piece.of(unit.parameter, part, own)
                self._units_in[unit.owner].append(piece)
                if sharding.sends_to(rank, unit.owner):
                    self._shards_out[unit.owner].append(piece)
            for other in ranks if unit.owner == rank else ():
                if (part := overlap(sharding.boxes[other], unit.box)) is not None:
                    piece = _Piece.of(number[id(unit)], part, unit.box)
                    self._units_out[other].append(piece)
                    if sharding.sends_to(other, rank):
                        self._shards_in[other].append(piece)

    def gather(self, shards: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], None]:
        """Start to send `shards`, (E, R, C) of each parameter as this process holds them, to the owners.

        Returns a function that waits, and fills a tensor for each of `owned`.
        """
        self._like = shards[0].new_empty(0)
        received, work = self._all_to_all(shards, self._shards_out, self._shards_in)

        def finish(units: Sequence[Tensor]) -> None:
            if work is not None:
                work.wait()
            for piece, values in _split(received, self._shards_in):
                units[piece.tensor][piece.slices].copy_(values)

        return finish

    def scatter(self, units: Sequence[Tensor], shards: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Send a tensor for each of `owned` to all processes that hold a part of it, in the dtype that it arrived in.

        Returns views of `shards`, which the units cover, and the values for each view, in the dtype of the shards.
        """
        received, work = self._all_to_all(units, self._units_out, self._units_in)
        if work is not None:
            work.wait()
        pieces = _split(received.to(shards[0].dtype), self._units_in)
        return [shards[piece.tensor][piece.slices] for piece, _ in pieces], [values for _, values in pieces]

    def _all_to_all(
        self, tensors: Sequence[Tensor], out: list[list[_Piece]], into: list[list[_Piece]]
    ) -> tuple[Tensor, dist.Work | None]:
        flat = [tensors[piece.tensor][piece.slices].reshape(-1) for pieces in out for piece in pieces]
        sent = torch.cat(flat) if flat else self._like.new_empty(0)
        if not self._multiprocess:
            return sent, None
        sizes_out, sizes_in = ([sum(piece.numel for piece in pieces) for pieces in each] for each in (out, into))
        received = self._like.new_empty(sum(sizes_in))
        return received, dist.all_to_all_single(received, sent, sizes_in, sizes_out, async_op=True)


def _split(flat: Tensor, pieces_of_ranks: list[list[_Piece]]) -> list[tuple[_Piece, Tensor]]:
    """Return the values of every piece, in its shape."""
    pieces = [piece for pieces in pieces_of_ranks for piece in pieces]
    values = flat.split([piece.numel for piece in pieces])
    return [(piece, value.view(piece.shape)) for piece, value in zip(pieces, values, strict=True)]
