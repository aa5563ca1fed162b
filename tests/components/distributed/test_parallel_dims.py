"""The mesh of a run, from its keys and the placement of its processes."""

from __future__ import annotations

import pytest

from components.distributed.parallel_dims import MeshShape, ParallelConfig

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("world", "local", "keys", "expected"),
    [
        (8, None, {}, (1, 8, 1, 1)),
        (8, 8, {"tp": 2}, (1, 4, 1, 2)),
        (16, 8, {}, (2, 8, 1, 1)),
        (64, 8, {"tp": 4}, (8, 2, 1, 4)),
        (4, 1, {}, (4, 1, 1, 1)),
        (16, 4, {"tp": 8}, (1, 2, 1, 8)),  # TP groups larger than a node: all processes share one replica
        (6, 4, {}, (1, 6, 1, 1)),  # nodes of different sizes: the same
        (64, 8, {"dp_shard": 64}, (1, 64, 1, 1)),
        (64, 8, {"dp_shard": 16}, (4, 16, 1, 1)),
        (64, 8, {"dp_replicate": 1}, (1, 64, 1, 1)),
        (64, 8, {"dp_replicate": 2, "tp": 2}, (2, 16, 1, 2)),
        (8, 8, {"cp": 2}, (1, 4, 2, 1)),
        (64, 8, {"cp": 2, "tp": 2}, (8, 2, 2, 2)),
        (16, 4, {"cp": 8}, (1, 2, 8, 1)),
    ],
)
def test_a_node_holds_a_replica_by_default(world, local, keys, expected):
    assert ParallelConfig(**keys).mesh_shape(world, local) == MeshShape(*expected)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"dp_shard": 3}, "2 (dp_replicate) x 3 (dp_shard) x 1 (tp) is not the 8 processes"),
        ({"dp_shard": 16}, "1 (dp_replicate) x 16 (dp_shard) x 1 (tp)"),
        ({"dp_replicate": 16}, "16 (dp_replicate) x 1 (dp_shard) x 1 (tp)"),
        ({"tp": 16}, "tp: cp x tp = 16 does not divide"),
        ({"cp": 3}, "cp: cp x tp = 3 does not divide the 8 processes of this run"),
        ({"dp_replicate": 2, "dp_shard": 2}, "2 (dp_replicate) x 2 (dp_shard)"),
    ],
)
def test_sizes_that_do_not_multiply_out_are_an_error_with_the_arithmetic(keys, said):
    with pytest.raises(ValueError, match="8 processes") as error:
        ParallelConfig(**keys).mesh_shape(8)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("keys", "length", "said"),
    [
        ({}, 7, None),
        ({"tp": 2}, 6, None),
        ({"tp": 4}, 6, "6 is not divisible by parallel.tp = 4"),
        ({"cp": 2}, 8, None),
        ({"cp": 2}, 6, "6 is not divisible by 4: each of parallel.cp = 2 ranks computes two equal chunks"),
        ({"cp": 2, "tp": 2}, 4, None),
        ({"cp": 2, "tp": 4}, 12, "12 is not divisible by 8: each of parallel.cp = 2 ranks computes two equal chunks, "
                                 "whose tokens are divided among parallel.tp = 4 ranks"),
        ({"cp": 3, "tp": 3}, 18, None),
    ],
)  # fmt: skip
def test_a_length_that_cannot_be_divided_is_explained_with_the_arithmetic(keys, length, said):
    assert ParallelConfig(**keys).length_problem(length) == said
