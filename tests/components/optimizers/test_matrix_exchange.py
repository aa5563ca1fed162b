"""Shards go to the owner of each matrix and updates come back, on any division: simulated in one process."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from components.optimizers import matrix_exchange
from components.optimizers.matrix_exchange import Box, MatrixExchange, Sharding, Unit, assign_units, overlap

pytestmark = pytest.mark.quick


class Transport:
    """The all-to-alls of all ranks; data is delivered when the first one waits."""

    def __init__(self) -> None:
        self.calls: list[tuple[torch.Tensor, torch.Tensor, list[int], list[int]]] = []

    def all_to_all_single(self, received, sent, sizes_in, sizes_out, async_op):
        self.calls.append((received, sent, sizes_in, sizes_out))
        return SimpleNamespace(wait=self.deliver)

    def deliver(self) -> None:
        outgoing = [sent.split(sizes) for _, sent, _, sizes in self.calls]
        for rank, (received, _, sizes_in, _) in enumerate(self.calls):
            parts = [outgoing[source][rank] for source in range(len(self.calls))]
            assert [len(part) for part in parts] == sizes_in
            received.copy_(torch.cat(parts))


def chunks(size: int, ranks: int) -> list[tuple[int, int]]:
    """Return the chunks of torch.chunk; the last ones may be short or empty."""
    step = -(-size // ranks)
    return [(min(step * rank, size), min(step * (rank + 1), size)) for rank in range(ranks)]


def sharding(shape: tuple[int, int, int], replicas: int, shards: int, tp: int, dims: tuple[int, int]) -> Sharding:
    """Return a tensor cut along `dims` over shards and TP ranks, with equal replicas."""
    boxes: list[Box] = []
    for _, shard, rank in itertools.product(range(replicas), range(shards), range(tp)):
        box = [(0, size) for size in shape]
        for dim, ranks, index in ((dims[1], tp, rank), (dims[0], shards, shard)):
            first, end = box[dim]
            cut = chunks(end - first, ranks)[index]
            box[dim] = (first + cut[0], first + cut[1])
        boxes.append(tuple(box))
    groups = [(replica,) for replica in range(replicas) for _ in range(shards * tp)]
    return Sharding(shape, boxes, groups)


def cut(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    return tensor[tuple(slice(*ends) for ends in box)]


SHAPES = st.tuples(st.sampled_from([1, 1, 3, 5]), st.integers(1, 7), st.integers(1, 5))


@given(
    shapes=st.lists(SHAPES, min_size=1, max_size=4),
    mesh=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 2)),
    dims=st.tuples(st.sampled_from([0, 1]), st.sampled_from([1, 2])),
)
def test_owners_receive_whole_matrices_and_every_rank_its_shards(shapes, mesh, dims):
    world_size = mesh[0] * mesh[1] * mesh[2]
    shardings = [
        sharding(shape, *mesh, dims=(dims[0] if shape[0] > 1 else max(1, dims[0]), dims[1])) for shape in shapes
    ]
    units = assign_units(shardings, lambda index: 1.0, world_size)
    covered = [sum(torch.Size(unit.shape).numel() for unit in units if unit.parameter == n) for n in range(len(shapes))]
    assert covered == [torch.Size(shape).numel() for shape in shapes]
    whole = [torch.randn(shape) for shape in shapes]
    exchanges = [MatrixExchange(units, shardings, rank, world_size) for rank in range(world_size)]
    transport = Transport()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrix_exchange, "dist", transport)
        finish = [
            exchange.gather([cut(tensor, each.boxes[rank]) for tensor, each in zip(whole, shardings, strict=True)])
            for rank, exchange in enumerate(exchanges)
        ]
        owned = [[torch.full(unit.shape, torch.nan) for unit in exchange.owned] for exchange in exchanges]
        for fill, views in zip(finish, owned, strict=True):
            fill(views)
        for exchange, views in zip(exchanges, owned, strict=True):
            for unit, found in zip(exchange.owned, views, strict=True):
                assert torch.equal(found, cut(whole[unit.parameter], unit.box))
        assert sum(map(len, owned)) == len(units), "one owner each"


def received_elements(mesh: tuple[int, int, int], shape: tuple[int, int, int], count: int) -> list[tuple[int, int]]:
    """Return the elements that each rank receives from others: shards, and updates."""
    world_size = mesh[0] * mesh[1] * mesh[2]
    shardings = [sharding(shape, *mesh, dims=(1, 2)) for _ in range(count)]
    units = assign_units(shardings, lambda index: 1.0, world_size)
    found = []
    for rank in range(world_size):
        shards = updates = 0
        for unit in units:
            each = shardings[unit.parameter]
            if unit.owner == rank:
                for other in set(range(world_size)) - {rank}:
                    if each.sends_to(other, rank) and (part := overlap(each.boxes[other], unit.box)):
                        shards += torch.Size(Unit(0, part, 0).shape).numel()
            elif part := overlap(each.boxes[rank], unit.box):
                updates += torch.Size(Unit(0, part, 0).shape).numel()
        found.append((shards, updates))
    return found


@pytest.mark.parametrize(
    ("mesh", "shards", "updates"),
    [((4, 1, 1), 0, 3 / 4), ((1, 4, 1), 3 / 16, 3 / 16), ((1, 2, 2), 3 / 16, 3 / 16), ((2, 2, 1), 1 / 8, 3 / 8)],
)
def test_what_a_rank_receives_is_the_table_of_the_docs(mesh, shards, updates):
    """As fractions of all elements. P e / W of docs/optimizers.md, less the part that a rank holds itself."""
    shape, count = (1, 8, 8), 16
    assert received_elements(mesh, shape, count) == [(shards * count * 64, updates * count * 64)] * 4
