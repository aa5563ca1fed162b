"""The decoder alone: causal, independent over the batch, sure of its own cost; its loss is that of its logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from components.token_ids import IGNORE_INDEX
from models.decoder import Decoder, RMSNorm
from models.presets import LlamaShape
from models.rope import RopeScaling

pytestmark = pytest.mark.quick

SMALL = LlamaShape(dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=48)
SHAPES = {
    "grouped": SMALL,
    "all heads": LlamaShape(dim=32, layers=2, heads=4, kv_heads=4, ffn_dim=48),
    "one key-value head": LlamaShape(dim=32, layers=3, heads=4, kv_heads=1, ffn_dim=40, head_dim=12),
    "tied and scaled": LlamaShape(
        dim=24, layers=2, heads=2, kv_heads=1, ffn_dim=64, tied_embeddings=True, rope_scaling=RopeScaling()
    ),
}
V, B, T = 61, 3, 20
shapes = pytest.mark.parametrize("size", SHAPES.values(), ids=SHAPES)


def decoder(size: LlamaShape, seed: int = 0) -> Decoder:
    """Weights large enough that attention is far from uniform."""
    model = Decoder(size, V, init_std=0.25)
    model.init_weights(seed)
    return model


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def labels() -> Tensor:
    shifted = tokens().roll(-1, 1)
    shifted[:, -1] = IGNORE_INDEX
    shifted[1, :5] = IGNORE_INDEX
    return shifted


@shapes
def test_the_loss_is_the_cross_entropy_of_the_logits(size):
    model = decoder(size)
    losses = (
        model(tokens(), labels()),
        F.cross_entropy(model(tokens()).flatten(0, 1), labels().flatten(), reduction="sum"),
    )
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    assert losses[0].shape == () and losses[0].dtype == torch.float32
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)  # float32 sums in another order
    for name, ours, reference in zip(dict(model.named_parameters()), *gradients, strict=True):
        assert (ours - reference).norm() < 1e-5 * reference.norm(), name


@shapes
@pytest.mark.parametrize("changed", [1, 7, T - 1])
def test_a_token_changes_no_earlier_logits_and_all_later_ones(size, changed):
    model, before = decoder(size), tokens()
    after = before.clone()
    after[1, changed] = (after[1, changed] + 1) % V
    with torch.no_grad():
        difference = (model(before) - model(after)).abs().amax(-1)
    assert not difference[1, :changed].any(), "bitwise: what attention masks it multiplies by exactly 0"
    assert difference[1, changed:].min() > 1e-5
    assert not difference[[0, 2]].any(), "nor those of another sequence"


@shapes
def test_a_sequence_is_its_own_prefix_whatever_the_batch(size):
    model = decoder(size)
    with torch.no_grad():
        whole, part = model(tokens()), model(tokens()[1:2, :9])
    torch.testing.assert_close(part[0], whole[1, :9], rtol=0, atol=2e-5)  # matrix products of other shapes


def test_order_matters():
    """Without rotation, one layer would give the last token the same logits for any order of the earlier ones."""
    size = LlamaShape(dim=32, layers=1, heads=4, kv_heads=2, ffn_dim=48)
    model, given = decoder(size), tokens()
    swapped = given.clone()
    swapped[:, [2, 11]] = given[:, [11, 2]]
    with torch.no_grad():
        difference = (model(given)[:, -1] - model(swapped)[:, -1]).abs().max()
    assert difference > 1e-3


@shapes
def test_flops_are_those_torch_counts(size):
    model = decoder(size)
    # The math kernel: two products of the full T x T square forward and four backward, none repeated.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        F.cross_entropy(model(tokens()).flatten(0, 1), labels().flatten()).backward()
    assert counter.get_total_flops() == model.flops_per_token(T) * B * T


def test_flops_of_a_known_model():
    with torch.device("meta"):
        model = Decoder(LlamaShape(dim=4096, layers=32, heads=32, kv_heads=8, ffn_dim=14336), 128_256)
    matrices = 8_030_261_248 - 128_256 * 4096 - 65 * 4096  # Llama 3.1 8B without its embedding and norms
    assert model.flops_per_token(8192) == 6 * matrices + 12 * 32 * 4096 * 8192


def test_the_norm_divides_by_the_root_mean_square_and_multiplies_by_its_gain():
    norm, x = RMSNorm(8, 0.5), torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
    by_hand = x / (x.square().mean(-1, keepdim=True) + 0.5).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), by_hand, rtol=1e-6, atol=1e-6)  # float32


def test_a_tied_head_is_the_embedding_and_gathers_both_gradients():
    tied = decoder(SHAPES["tied and scaled"])
    untied = Decoder(replace(tied.shape, tied_embeddings=False), V)
    assert set(untied.state_dict()) - set(tied.state_dict()) == {"output.weight"}
    untied.load_state_dict(tied.state_dict() | {"output.weight": tied.tok_embeddings.weight})
    for model in (tied, untied):
        model(tokens(), labels()).backward()
    both = untied.tok_embeddings.weight.grad + untied.output.weight.grad
    torch.testing.assert_close(tied.tok_embeddings.weight.grad, both, rtol=1e-5, atol=1e-5)  # float32 sums


def test_bf16_autocast_keeps_a_float32_loss_close_by_and_float32_gradients():
    model = decoder(SMALL)
    exact = model(tokens(), labels())
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens(), labels())
        assert model(tokens()).dtype == torch.bfloat16
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.01)  # 8 bits a value, and the mean of 52 of them
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_block_is_one_graph_to_the_compiler():
    model = decoder(SMALL)
    eager = model(tokens())
    torch.compiler.reset()
    for layer in model.layers.values():
        layer.compile(backend="eager", fullgraph=True)  # raises where it would break the graph
    torch.testing.assert_close(model(tokens()), eager, rtol=0, atol=1e-6)


def test_modules_have_the_names_that_plans_for_them_use():
    names = {name.replace("layers.1.", "layers.0.") for name, _ in decoder(SMALL).named_parameters()}
    layer = ("attention_norm", "ffn_norm", *(f"attention.{w}" for w in ("wq", "wk", "wv", "wo")))
    layer += tuple(f"feed_forward.{w}" for w in ("w_gate", "w_up", "w_down"))
    assert names == {
        f"{name}.weight" for name in ("tok_embeddings", "norm", "output", *(f"layers.0.{n}" for n in layer))
    }


def test_every_learning_rate_multiplier_is_one():
    model = decoder(SMALL)
    assert {model.lr_multiplier(name) for name, _ in model.named_parameters()} == {1.0}
