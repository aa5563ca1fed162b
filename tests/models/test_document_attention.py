"""Documents that share a sequence: each is computed as it would be alone, independently of the others."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch
import torch.nn.attention.flex_attention as flex
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from components.token_ids import IGNORE_INDEX
from models import decoder as module
from models.attention_backends import attention_backends
from models.decoder import Decoder
from models.document_attention import PerDocumentAttention, document_positions
from models.flex_attention import FlexAttention, _flex_attention
from models.mup import MuP
from models.presets import LlamaShape
from models.rope import RopeScaling
from tests.models.variants import combined_shapes

pytestmark = [
    pytest.mark.quick,
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]

V, B, T, END = 61, 4, 24, 7
SMALL = LlamaShape(dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=48)
SHAPES = {
    "grouped": SMALL,
    "all heads": replace(SMALL, kv_heads=4),
    "tied and scaled": replace(
        SMALL, kv_heads=1, head_dim=12, tied_embeddings=True, rope_scaling=RopeScaling(original_max_position=16)
    ),
    "experts": replace(SMALL, experts=4, top_k=2),
    "muP": replace(SMALL, mup=MuP(base_width=16, embedding_multiplier=3.0, residual_multiplier=0.4)),
}
SHAPES |= combined_shapes(replace(SMALL, layers=4))
shapes = pytest.mark.parametrize("size", SHAPES.values(), ids=SHAPES)
ENDS = [[4, 5, 13], [0, 9], [T - 1], []]
"""Of each row: neighbors, the two edges of a sequence, and no end at all."""
EXACT = {"rtol": 0, "atol": 1e-12}
"""float64, whose sums are in another order."""


def decoder(size: LlamaShape) -> Decoder:
    """In float64, with weights large enough that attention is far from uniform."""
    model = Decoder(size, V, init_std=0.25)
    model.init_weights(0)
    return model.double().eval()  # evaluated, or routers would be trained for the balance of the whole micro-batch


def apart(size: LlamaShape) -> Decoder:
    model = decoder(size)
    model.enable_document_masking(END)
    return model


def tokens() -> Tensor:
    drawn = torch.randint(V - 1, (B, T), generator=torch.Generator().manual_seed(0))
    drawn += drawn >= END
    for row, ends in zip(drawn, ENDS, strict=True):
        row[ends] = END
    return drawn


def labels() -> Tensor:
    """The tokens that follow; in the first row some are ignored."""
    shifted = torch.cat((tokens()[:, 1:], torch.full((B, 1), 11)), 1)
    shifted[0, 2:5] = IGNORE_INDEX
    return shifted


def spans() -> list[tuple[int, int, int]]:
    """(row, first, end) of each document."""
    return [
        (row, *span)
        for row, ends in enumerate(ENDS)
        for span in pairwise([*([] if ends and ends[0] == 0 else [0]), *ends, T])
    ]


def test_positions_count_from_the_start_of_a_document_or_of_the_sequence():
    expected = torch.empty(B, T, dtype=torch.int64)
    for row, first, end in spans():
        expected[row, first:end] = torch.arange(end - first)
    assert torch.equal(document_positions(tokens() == END), expected)


@shapes
def test_logits_and_gradients_are_those_of_every_document_alone(size):
    packed, alone = apart(size), decoder(size)
    logits, loss = packed(tokens()), packed(tokens(), labels())
    loss.backward()
    losses = []
    for row, first, end in spans():
        document = (slice(row, row + 1), slice(first, end))
        torch.testing.assert_close(logits[document], alone(tokens()[document]), **EXACT)
        losses.append(alone(tokens()[document], labels()[document]))
    torch.testing.assert_close(loss, torch.stack(losses).sum(), rtol=1e-12, atol=0)
    torch.stack(losses).sum().backward()
    expected = {name: parameter.grad for name, parameter in alone.named_parameters()}
    for name, parameter in packed.named_parameters():
        assert expected[name].norm() > 0
        assert (parameter.grad - expected[name]).norm() < 1e-12 * expected[name].norm(), name


@shapes
@pytest.mark.parametrize("blocks", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["per document", "flex"])
def test_a_document_changes_nothing_of_another(size, blocks, monkeypatch):
    if blocks:
        monkeypatch.setattr(module, "attention_backends", uncompiled)
    model, before = apart(size), tokens()
    for row, first, end in spans():
        after = before.clone()
        changed = slice(first + (before[row, first] == END), end)
        after[row, changed] = (after[row, changed] + 1) % END  # no other end appears
        with torch.no_grad():
            difference = (model(before) - model(after)).abs().amax(-1)
        own = torch.zeros(B, T, dtype=torch.bool)
        own[row, changed] = True
        # bitwise, but that an expert's products have the shape of what all documents send it
        assert difference[~own].max() <= (1e-13 if size.experts else 0)
        assert (difference[own] > 1e-6).all()


def uncompiled(shape: LlamaShape, starts_BT: Tensor, length: int, device: torch.device, _: None) -> list[FlexAttention]:
    windows = {shape.window_of(layer) for layer in range(shape.layers)}
    return [FlexAttention(starts_BT.cumsum(-1), length, device, windows, compiled=False)] * shape.layers


def per_document(shape: LlamaShape, starts_BT: Tensor, *_: object) -> list[PerDocumentAttention]:
    return [PerDocumentAttention(starts_BT.cumsum(-1))] * shape.layers


@shapes
def test_flex_attention_equals_attention_per_document(size, monkeypatch):
    """As on a GPU, but with the kernel that materializes all scores; backward too, which torch refuses on a CPU."""
    found = []
    for way in (attention_backends, uncompiled):
        model = apart(size)
        monkeypatch.setattr(module, "attention_backends", way)
        monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None, raising=False)
        logits = model(tokens())
        found.append((logits, *torch.autograd.grad(model(tokens(), labels()), list(model.parameters()))))
    backend = attention_backends(size, tokens() == END, T, tokens().device, None)[0]
    assert isinstance(backend, PerDocumentAttention), "on a CPU"
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("length", [256, 200], ids=["whole blocks", "a part of one"])
def test_the_gpu_kernel_equals_attention_per_document(length, monkeypatch):
    given = torch.randint(V, (B, length), generator=torch.Generator().manual_seed(0)).cuda()
    found = []
    for way in (per_document, attention_backends):
        monkeypatch.setattr(module, "attention_backends", way)
        model = apart(replace(SMALL, dim=64)).float().cuda()
        loss = model(given, given.roll(-1, 1))
        found.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    backend = attention_backends(replace(SMALL, dim=64), given == END, length, given.device, None)[0]
    assert isinstance(backend, FlexAttention)
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() < 1e-2 * theirs.norm()  # the kernel may multiply in TF32


@pytest.mark.slow
def test_a_block_compiles_once_for_all_micro_batches(monkeypatch):
    """As a whole with flex attention; attention per document is not compiled, because its lengths vary."""
    for way, whole in ((attention_backends, False), (uncompiled, True)):
        monkeypatch.setattr(module, "attention_backends", way)
        eager, compiled, counter = apart(SMALL), apart(SMALL), CompileCounter()
        for layer in compiled.layers.values():
            layer.compile(backend=counter, fullgraph=whole)
        with torch.no_grad():
            compiled(tokens())
            before = counter.frame_count
            for shift in (1, 5):
                given = tokens().roll(shift, 1)
                torch.testing.assert_close(compiled(given), eager(given), **EXACT)
        assert counter.frame_count == before > 0


@pytest.mark.slow
def test_every_shape_of_training_validation_and_tasks_is_compiled(monkeypatch):
    """More than the 8 variants of a function after which PyTorch runs it without compiling it."""
    counter, compile_with = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **keys: compile_with(function, backend=counter, **keys))
    monkeypatch.setattr("models.flex_attention._flex_attention", cache(_flex_attention.__wrapped__))
    with torch.compiler.config.patch(recompile_limit=8):
        for length in (8, 16, 24, 32, 40):
            FlexAttention(None, length, torch.device("cpu"), (0, 4))
    assert counter.frame_count == 10


def test_without_an_end_it_is_attention_within_the_sequence():
    given = tokens().where(tokens() != END, 0)
    with torch.no_grad():
        torch.testing.assert_close(apart(SMALL)(given), decoder(SMALL)(given), **EXACT)


def test_a_cache_holds_one_document():
    """Generation does not ask for others, and a prompt may begin with the end token of what was before."""
    given, model = tokens()[1:2, :9], apart(SMALL)
    with torch.no_grad():
        cached = [each.float()(given, cache=each.new_cache([0], 9)) for each in (model, decoder(SMALL))]
        assert torch.equal(*cached)
        torch.testing.assert_close(cached[0][:, -1], model(given)[:, -1], rtol=0, atol=2e-5)  # float32
    assert nn.Module.state_dict(model).keys() == decoder(SMALL).state_dict().keys(), "nothing of it is saved"
