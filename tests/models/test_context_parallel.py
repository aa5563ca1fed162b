"""Attention of the chunks of a context-parallel rank, against attention over whole sequences in one process."""

from __future__ import annotations

import pytest
import torch
import torch.nn.attention.flex_attention as flex
from torch import Tensor

import models.context_parallel
from components.distributed.context_parallel import ContextParallelRanks
from models.attention import AttentionRule, causal_attention
from models.context_parallel import ChunkAttention, ContextParallelAttention
from models.document_attention import PerDocumentAttention
from models.flex_attention import FlexAttention

pytestmark = [
    pytest.mark.quick,
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]

B, T, H, K, C = 2, 48, 4, 2, 8
CPU = torch.device("cpu")
RULES = {
    "all keys": AttentionRule(),
    "scaled": AttentionRule(scale=0.5),
    "window": AttentionRule(window=7),
    "window longer than a chunk": AttentionRule(window=20),
    "softcap": AttentionRule(softcap=1.5),
    "window and softcap": AttentionRule(window=7, softcap=1.5),
}


class Mesh:
    """The mesh of rank `rank` of `ranks`, without processes."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks

    def get_local_rank(self) -> int:
        return self.rank

    def size(self) -> int:
        return self.ranks


def given() -> list[Tensor]:
    """Queries (B, T, H, C), keys and values (B, T, K, C) in float64, with gradients."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(B, T, heads, C, dtype=torch.float64, generator=generator).requires_grad_() for heads in (H, K, K)
    ]


def numbers(documents: bool) -> Tensor | None:
    """Documents that begin and end within chunks and at their edges, one longer than half of a sequence."""
    if not documents:
        return None
    starts = torch.zeros(B, T, dtype=torch.bool)
    starts[0, [3, 12, 13, 37]] = True
    starts[1, [0, 30]] = True
    return starts.cumsum(-1)


def expected(q: Tensor, k: Tensor, v: Tensor, documents_BT: Tensor | None, rule: AttentionRule) -> Tensor:
    if documents_BT is not None:
        return PerDocumentAttention(documents_BT).attend(q, k, v, rule)
    return causal_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), rule)


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("kernel", ["chunks", "flex"])
def test_the_chunks_of_all_ranks_are_the_whole(kernel, rule, documents, monkeypatch):
    monkeypatch.setattr(models.context_parallel, "_QUERIES", 5)  # a chunk has 8 to 24
    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None, raising=False)  # its backward on a CPU
    q, k, v = given()
    documents_BT = numbers(documents)
    wanted_BHTC = expected(q, k, v, documents_BT, rule)
    weights = torch.randn(wanted_BHTC.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad((wanted_BHTC * weights).sum(), [q, k, v])
    for ranks in (1, 2, 3):
        outputs, gradients = torch.empty_like(wanted_BHTC), [torch.zeros_like(each) for each in (q, k, v)]
        for rank in range(ranks):
            shards = ContextParallelRanks(Mesh(rank, ranks))
            positions_t = shards.shard(torch.arange(T), 0)
            if kernel == "chunks":
                backend = ChunkAttention(shards.chunks(T), documents_BT)
            else:
                backend = FlexAttention(documents_BT, T, CPU, {rule.window}, positions_t=positions_t, compiled=False)
            out_BHtC = backend.attend(shards.shard(q), k, v, rule)
            outputs[:, :, positions_t] = out_BHtC.detach()
            summands = torch.autograd.grad((out_BHtC * shards.shard(weights, 2)).sum(), [q, k, v])
            gradients = [total + summand for total, summand in zip(gradients, summands, strict=True)]
            documents_seen = ContextParallelAttention(shards, backend).documents()
            assert documents_seen is documents_BT
        torch.testing.assert_close(outputs, wanted_BHTC, rtol=0, atol=1e-12)
        for found, each in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(found, each, rtol=0, atol=1e-11)


def test_autograd_keeps_one_mask_and_one_copy_of_keys_for_all_queries():
    """A mask or keys for each of its calls would be as large as all logits."""
    length, chunk = 4096, 1024  # two ranks
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    q = torch.randn(1, 2 * chunk, H, C, requires_grad=True)
    k, v = (torch.randn(1, length, K, C, requires_grad=True) for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ChunkAttention((0, length - chunk, chunk), None).attend(q, k, v, AttentionRule())
    queries, keys = 2 * chunk * H * C, length * H * C  # keys and values of every head
    assert sum(kept.values()) < 4 * 1.1 * (256 * length + 2 * queries + 2 * keys)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_ranks_cut_a_sequence_from_both_ends_and_have_equal_work(ranks):
    whole = torch.arange(16)
    parts = [ContextParallelRanks(Mesh(rank, ranks)).shard(whole, 0) for rank in range(ranks)]
    assert torch.equal(torch.cat(parts).sort().values, whole)
    assert len({int((part + 1).sum()) for part in parts}) == 1, "keys that the queries of each rank attend to"
    assert parts[0].tolist()[:2] == [0, 1] and parts[0].tolist()[-1] == 15


def test_a_length_that_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match=r"18 tokens cannot be cut into 2 x 2 \(parallel.cp\) equal chunks"):
        ContextParallelRanks(Mesh(0, 2)).chunks(18)
