"""The count on fake tensors against what autograd really keeps, and against the formula."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models.decoder import Block, Decoder
from models.presets import LlamaShape
from models.rope import rope_frequencies, rope_table
from recipes.dry_run.activation_memory import Activations, BlockActivations, count_activations
from tests.models.variants import combined_shapes

pytestmark = pytest.mark.quick

SIZE = LlamaShape(dim=64, layers=3, heads=4, kv_heads=2, ffn_dim=160)
BATCH, LENGTH = 3, 40
NAMES = [f"layers.{i}" for i in range(SIZE.layers)]


EXPERTS = replace(SIZE, ffn_dim=32, experts=6, top_k=2)


def counted(compute_dtype=torch.float32, size: LlamaShape = SIZE, device_type: str = "cpu") -> Activations:
    with torch.device("meta"):
        model = Decoder(size, 500)
    return count_activations(
        model,
        NAMES,
        micro_batch_size=BATCH,
        sequence_length=LENGTH,
        compute_dtype=compute_dtype,
        device_type=device_type,
    )


def really_kept(compute_dtype: torch.dtype, size: LlamaShape = SIZE) -> int:
    """Bytes of all storages that a real forward pass saves, but for parameters."""
    model = Decoder(size, 500)
    model.init_weights(0)
    model.to(compute_dtype)
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.randint(500, (BATCH, LENGTH))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(tokens, tokens)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_float32_is_what_autograd_keeps():
    assert counted().peak("none") == pytest.approx(really_kept(torch.float32), rel=0.01)


@pytest.mark.parametrize("name", ["combination 1", "combination 2"])
def test_variants_are_counted_as_autograd_keeps_them(name):
    size = combined_shapes(SIZE)[name]
    found = counted(size=size)
    assert found.peak("none") == pytest.approx(really_kept(torch.float32, size), rel=0.01)


def test_on_a_gpu_a_window_and_a_softcap_keep_what_plain_attention_does():
    size = replace(SIZE, sliding_window=4, attention_softcap=5.0)
    on_gpu = counted(size=size, device_type="cuda")
    assert on_gpu == counted() != counted(size=size)


def test_bf16_is_what_autograd_keeps():
    activations = counted(compute_dtype=torch.bfloat16)
    assert activations.peak("none") == pytest.approx(really_kept(torch.bfloat16), rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("size", [SIZE, EXPERTS], ids=["dense", "experts"])
def test_a_compiled_block_keeps_what_its_partitioned_graph_does(size):
    """The partitioner is the one torch.compile uses before it makes kernels, so no compiler is needed."""
    torch._dynamo.reset()
    block = Block(size, 0).to(torch.bfloat16)
    compiled = torch.compile(block, backend="aot_eager_decomp_partition", dynamic=False)  # whatever was compiled before
    rope = rope_table(LENGTH, torch.tensor(rope_frequencies(size.head_width, size.rope_theta)))
    x = torch.randn(BATCH, LENGTH, size.dim, dtype=torch.bfloat16, requires_grad=True)
    given = {tensor.untyped_storage()._cdata for tensor in (*block.parameters(), rope)}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compiled(x, rope)
    really = sum(storage.nbytes() for number, storage in kept.items() if number not in given)
    counted_block = counted(torch.bfloat16, size).blocks[1].compiled()
    # not modeled: the rms of a token in each norm, and which small results of the routing the partitioner recomputes
    assert counted_block.kept == pytest.approx(really, rel=0.005)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_are_counted_as_the_rest(dtype):
    activations = counted(compute_dtype=dtype, size=EXPERTS)
    assert activations.peak("none") == pytest.approx(really_kept(dtype, EXPERTS), rel=0.01)
    sent, dense = 2 * BATCH * LENGTH, counted(compute_dtype=dtype)
    more = activations.blocks[1].saved_ops - dense.blocks[1].saved_ops
    # of each copy of a token gate, up and output, and the router's logits; of the dense one the same
    element = dtype.itemsize
    experts = element * sent * (2 * 32 + SIZE.dim) + 4 * BATCH * LENGTH * 6
    experts += sent * (4 + 1)  # the chosen logits, and the sorted numbers of experts
    assert more == experts - element * BATCH * LENGTH * (2 * 160 + SIZE.dim)


def test_a_float32_block_follows_the_formula_of_the_documentation():
    heads, kv = SIZE.heads * SIZE.head_width, SIZE.kv_heads * SIZE.head_width
    values = 4 * SIZE.dim + 2 * heads + 2 * kv + 3 * SIZE.ffn_dim
    for block in counted().blocks[1:]:
        assert block.kept == pytest.approx(4 * values * BATCH * LENGTH, rel=0.05)
        assert block.input == 4 * SIZE.dim * BATCH * LENGTH


BLOCKS = Activations((BlockActivations(100, 10, 40),) * 4, outside_blocks=7)


@pytest.mark.parametrize(
    ("checkpointing", "bytes_kept"),
    [
        ("none", 400 + 7),
        ("full", 4 * 10 + 90 + 7),
        ("selective", 4 * 50 + 50 + 7),
        (2, 2 * 100 + 2 * 10 + 90 + 7),
        (5, 400 + 7),
    ],
)
def test_checkpointing_keeps_less_and_computes_one_block_again(checkpointing, bytes_kept):
    assert BLOCKS.peak(checkpointing) == bytes_kept


def test_tensor_parallel_ranks_split_all_but_two_gathered_inputs():
    assert BLOCKS.blocks[0].per_tp_rank(4) == BlockActivations(20 + 80 // 4, 10 // 4, 10)


def test_the_model_is_left_as_it_was():
    with torch.device("meta"):
        model = Decoder(SIZE, 500)
    count_activations(
        model,
        NAMES,
        micro_batch_size=1,
        sequence_length=8,
        compute_dtype=torch.bfloat16,
    )
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float32)}
    assert not model.layers["0"]._forward_hooks
