"""With a cache the decoder computes the same as without, in any batch and with either memory layout of the weights."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import pytest
import torch
from torch import Tensor

from components.distributed.context_parallel import ContextParallelRanks
from models import mkldnn_linear
from models.decoder import Decoder
from models.mup import MuP
from models.presets import LlamaShape
from models.rope import RopeScaling
from models.sharded_kv_cache import ShardedKeyValueCache
from tests.models.variants import combined_shapes

pytestmark = pytest.mark.quick

V = 61
SMALL = LlamaShape(dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=48)
SHAPES = {
    "grouped": SMALL,
    "all heads": replace(SMALL, kv_heads=4),
    "one wide key-value head": replace(SMALL, kv_heads=1, head_dim=12),
    "tied and scaled": replace(SMALL, tied_embeddings=True, rope_scaling=RopeScaling(original_max_position=16)),
    "experts": replace(SMALL, experts=4, top_k=2),
    "muP": replace(SMALL, mup=MuP(base_width=16, embedding_multiplier=3.0, residual_multiplier=0.4)),
}
SHAPES |= combined_shapes(replace(SMALL, layers=4))
shapes = pytest.mark.parametrize("size", SHAPES.values(), ids=SHAPES)
TOLERANCE = {"rtol": 0, "atol": 2e-5}
"""Logits of some units in float32, whose sums are in another order."""


def decoder(size: LlamaShape) -> Decoder:
    """Weights large enough that attention is far from uniform."""
    model = Decoder(size, V, init_std=0.25)
    model.init_weights(1)  # of seed 0 one greedy text is a single token over and over
    return model


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(V, (length,), generator=generator).tolist() for length in lengths]


def uncached(model: Decoder, prompt: list[int], steps: int) -> tuple[list[int], Tensor]:
    """The greedy continuation and the logits (steps, V) that chose it, each computed from the whole text."""
    ids, logits = list(prompt), []
    for _ in range(steps):
        logits.append(model(torch.tensor([ids]))[0, -1])
        ids.append(int(logits[-1].argmax()))
    return ids[len(prompt) :], torch.stack(logits)


def cached(model: Decoder, rows: list[list[int]], steps: int, multiple: int = 1) -> tuple[list[list[int]], Tensor]:
    """The same of several rows together, padded to a multiple of `multiple` tokens: logits (steps, B, V)."""
    longest = -(-max(map(len, rows)) // multiple) * multiple
    padding = [longest - len(row) for row in rows]
    cache = model.new_cache(padding, longest + steps - 1)
    tokens = torch.tensor([[0] * missing + row for missing, row in zip(padding, rows, strict=True)])
    logits, ids = [], []
    for _ in range(steps):
        logits.append(model(tokens, cache=cache)[:, -1])
        tokens = logits[-1].argmax(-1, keepdim=True)
        ids.append(tokens[:, 0])
    return torch.stack(ids, 1).tolist(), torch.stack(logits)


@shapes
@torch.no_grad()
def test_the_same_tokens_and_logits_as_without(size):
    model, [prompt] = decoder(size), prompts(7)
    expected, reference = uncached(model, prompt, 12)
    [found], logits = cached(model, [prompt], 12)
    assert found == expected
    assert len(set(found)) > 3, "else it says little"
    torch.testing.assert_close(logits[:, 0], reference, **TOLERANCE)


@shapes
@torch.no_grad()
def test_each_row_of_a_batch_is_what_it_is_alone(size):
    model, rows = decoder(size), prompts(1, 9, 4, 9)
    found, logits = cached(model, rows, 10)
    for row, (prompt, ids) in enumerate(zip(rows, found, strict=True)):
        expected, reference = uncached(model, prompt, 10)
        assert ids == expected
        torch.testing.assert_close(logits[:, row], reference, **TOLERANCE)


@torch.no_grad()
@shapes
@pytest.mark.parametrize("lengths", [(8,), (5, 8)])
def test_a_text_may_come_in_pieces(lengths, size):
    model, rows = decoder(size), prompts(*lengths)
    longest = max(lengths)
    padding = [longest - length for length in lengths]
    tokens = torch.tensor([[0] * missing + row for missing, row in zip(padding, rows, strict=True)])
    cache = model.new_cache(padding, longest)
    for start, end in ((0, 4), (4, 5), (5, 8)):
        logits = model(tokens[:, start:end], cache=cache)
    for row, prompt in enumerate(rows):
        torch.testing.assert_close(logits[row, -1], model(torch.tensor([prompt]))[0, -1], **TOLERANCE)


@torch.no_grad()
def test_in_half_precision_it_is_as_close_as_half_precision_is():
    model, [prompt] = decoder(SMALL).bfloat16(), prompts(9)
    _, logits = cached(model, [prompt], 1)
    reference = decoder(SMALL)(torch.tensor([prompt]))[0, -1]
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits[0, 0].float(), reference, rtol=0, atol=0.05 * reference.abs().max().item())


def test_more_than_there_is_room_for_is_refused():
    model = decoder(SMALL)
    cache = model.new_cache([0], 3)
    with pytest.raises(ValueError, match="4 tokens exceed the capacity of the cache, 3"):
        model(torch.zeros(1, 4, dtype=torch.int64), cache=cache)


class ThreadRanks(ContextParallelRanks):
    """Context-parallel ranks that are threads of this process."""

    def __init__(self, rank: int, parts: list[Tensor], barrier: Barrier) -> None:
        self.rank, self.size, self.parts, self.barrier = rank, len(parts), parts, barrier

    def all_gather(self, tensor: Tensor) -> Tensor:
        self.parts[self.rank] = tensor
        self.barrier.wait()
        gathered = torch.stack(self.parts)
        self.barrier.wait()  # before a part is replaced
        return gathered

    def gather(self, local: Tensor) -> Tensor:
        parts = [part.chunk(2, 1) for part in self.all_gather(local)]
        return torch.cat([head for head, _ in parts] + [tail for _, tail in reversed(parts)], 1)


def cached_in_ranks(size: LlamaShape, rows: list[list[int]], steps: int, ranks: int) -> list[tuple]:
    """The result of `cached` on each rank."""
    barrier = Barrier(ranks, timeout=300)
    parts = [torch.empty(0)] * ranks

    def on_rank(rank: int) -> tuple[list[list[int]], Tensor]:
        try:
            model = decoder(size)
            model.enable_context_parallelism(ThreadRanks(rank, parts, barrier))
            with torch.no_grad():  # of this thread
                return cached(model, rows, steps, multiple=2 * ranks)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(ranks) as threads:
        return list(threads.map(on_rank, range(ranks)))


@shapes
@pytest.mark.parametrize("ranks", [2, 3])
@torch.no_grad()
def test_context_parallel_ranks_generate_what_one_process_does(size, ranks):
    """Prompts with and without padding, and more new tokens than ranks, so that each rank stores some."""
    model = decoder(size)
    for lengths in ((12,), (1, 12, 8), (5,)):
        rows = prompts(*lengths)
        results = cached_in_ranks(size, rows, 9, ranks)
        for found, logits in results:
            assert found == results[0][0] and torch.equal(logits, results[0][1]), "ranks would sample different tokens"
            for row, (prompt, ids) in enumerate(zip(rows, found, strict=True)):
                expected, reference = uncached(model, prompt, 9)
                assert ids == expected
                torch.testing.assert_close(logits[:, row], reference, **TOLERANCE)


def test_a_context_parallel_rank_stores_its_part_and_takes_later_tokens_one_at_a_time():
    with pytest.raises(ValueError, match="after the prompt are appended one at a time"):
        model = decoder(SMALL)
        model.enable_context_parallelism(ThreadRanks(0, [torch.empty(0)], Barrier(1)))
        with torch.no_grad():
            cache = model.new_cache([0], 10)
            model(torch.zeros(1, 4, dtype=torch.int64), cache=cache)
            model(torch.zeros(1, 2, dtype=torch.int64), cache=cache)
    for ranks, stored in ((2, 7), (3, 5)):
        shards = ThreadRanks(0, [torch.empty(0)] * ranks, Barrier(1))
        cache = ShardedKeyValueCache(
            SMALL, [torch.zeros(2, 14, 1, 8)] * 2, padding=[0], capacity=14, device=torch.device("cpu"),
            dtype=torch.float32, shards=shards,
        )  # fmt: skip
        cache.extend(12)
        assert cache.new_slots(torch.float32).shape == (2, 1, 2, stored, 8)


@shapes
@torch.no_grad()
def test_a_model_with_mkldnn_linear_computes_the_same(size, monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN, and packs nothing")
    monkeypatch.setattr(mkldnn_linear, "MIN_WEIGHTS", 1)
    model, rows = decoder(size), prompts(3, 6)
    reference = [uncached(model, prompt, 6) for prompt in rows]
    model.use_mkldnn_linear()
    left = {name.split(".")[-2] for name, _ in model.named_parameters()}
    of_experts = {"router", "w_gate_up", "w_down"} if size.experts else set()
    assert {name for name in left if "norm" not in name} == {"tok_embeddings"} | of_experts
    found, logits = cached(model, rows, 6)
    for row, (expected, wanted) in enumerate(reference):
        assert found[row] == expected
        torch.testing.assert_close(logits[:, row], wanted, **TOLERANCE)
    with pytest.raises(ValueError, match="returns logits only"):
        model(torch.tensor([rows[0]]), torch.tensor([rows[0]]))


def test_mkldnn_linear_is_not_used_in_bf16_without_hardware_support(monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN, and packs nothing")
    monkeypatch.setattr(mkldnn_linear, "MIN_WEIGHTS", 1)
    monkeypatch.setattr(mkldnn_linear, "has_bf16_kernels", lambda: False)
    model = decoder(SMALL).bfloat16()
    model.use_mkldnn_linear()
    assert not any(isinstance(module, mkldnn_linear.MkldnnLinear) for module in model.modules())
