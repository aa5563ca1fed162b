"""Linear layers in float8, emulated on a CPU, against the same model without it."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from components.errors import InputError
from components.float8 import convert_to_float8
from models.decoder import Decoder
from models.presets import LlamaShape
from recipes.model_setup import transformer_blocks

pytest.importorskip("torchao", reason="the extra float8 is not installed")

CPU = torch.device("cpu")
SHAPE = LlamaShape(dim=64, layers=2, heads=4, kv_heads=2, ffn_dim=96)
V, B, T = 61, 4, 32


def decoder(shape: LlamaShape = SHAPE) -> Decoder:
    model = Decoder(shape, V)
    model.init_weights(0)
    return model


def converted(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"}


@pytest.mark.parametrize(("kind", "cosine"), [("rowwise", 0.99), ("tensorwise", 0.98)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_are_near_those_without_it(kind, cosine, dtype):
    exact, rounded = decoder(), decoder()
    names = [name for name, _ in rounded.named_parameters()]
    convert_to_float8(transformer_blocks(rounded), kind, CPU)
    assert [name for name, _ in rounded.named_parameters()] == names, "checkpoints stay the same"
    tokens = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(0))
    losses = []
    for model in (exact.to(dtype), rounded.to(dtype)):
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)
    assert losses[1] != losses[0], "a test that can fail"
    for (name, one), other in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        found = torch.nn.functional.cosine_similarity(one.grad.flatten().float(), other.grad.flatten().float(), 0)
        assert found > cosine, (name, float(found))


def test_only_matrices_of_blocks_in_multiples_of_16_are_converted():
    model = decoder(SHAPE)
    convert_to_float8(transformer_blocks(model), "rowwise", CPU, tp=2)  # 96 / 2 and 64 / 2 are multiples of 16
    attention, feed_forward = ("wq", "wk", "wv", "wo"), ("w_gate", "w_up", "w_down")
    assert converted(model) == {
        f"layers.{layer}.{part}.{name}"
        for layer in range(2)
        for part, names in (("attention", attention), ("feed_forward", feed_forward))
        for name in names
    }
    model = decoder(SHAPE)
    convert_to_float8(transformer_blocks(model), "rowwise", CPU, tp=4)  # 96 / 4 = 24, and 32 / 4 = 8 of wk and wv
    assert converted(model) == {f"layers.{layer}.attention.{name}" for layer in range(2) for name in ("wq", "wo")}
    experts = decoder(LlamaShape(dim=64, layers=1, heads=4, kv_heads=4, ffn_dim=96, experts=16, top_k=2))
    convert_to_float8(transformer_blocks(experts), "rowwise", CPU)
    assert converted(experts) == {f"layers.0.attention.{name}" for name in attention}, "no experts, no router"


def test_a_model_without_such_layers_is_refused():
    small = decoder(LlamaShape(dim=24, layers=1, heads=2, kv_heads=2, ffn_dim=40))
    with pytest.raises(InputError, match="no linear layer in a block has sizes that are multiples of 16") as error:
        convert_to_float8(transformer_blocks(small), "rowwise", CPU)
    assert error.value.key == "float8"
    with pytest.raises(InputError, match=r"multiples of 16 x 8 \(tp\)"):
        convert_to_float8(transformer_blocks(decoder()), "rowwise", CPU, tp=8)


def test_a_block_compiles_as_a_whole():
    eager, compiled = decoder(), decoder()
    for model in (eager, compiled):
        convert_to_float8(transformer_blocks(model), "rowwise", CPU)
    for block in compiled.layers.values():
        block.compile(backend="aot_eager", fullgraph=True)
    tokens = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(0))
    for model in (eager, compiled):
        model(tokens[:, :-1], tokens[:, 1:]).backward()
    for one, other in zip(eager.parameters(), compiled.parameters(), strict=True):
        assert (one.grad - other.grad).norm() < 1e-4 * one.grad.norm()


def test_the_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(InputError, match=r"needs the `torchao` library: pip install -e '\.\[float8\]'"):
        convert_to_float8(transformer_blocks(decoder()), "rowwise", CPU)
