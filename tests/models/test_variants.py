"""Every variant of the decoder, in combinations that cover all pairs, against a plain float64 computation."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from components.token_ids import IGNORE_INDEX
from models.attention import causal_attention
from models.decoder import Decoder
from models.mup import MuP
from models.presets import LlamaShape
from tests.models.variants import VARIANTS, combined_shapes, shape_with

pytestmark = pytest.mark.quick

V, B, T = 61, 2, 14
SMALL = LlamaShape(dim=32, layers=4, heads=4, kv_heads=2, ffn_dim=48)
SHAPES = {
    "Llama": SMALL,
    **{name: shape_with(SMALL, name) for name in VARIANTS},
    **combined_shapes(SMALL),
    "muP and CompleteP": shape_with(
        replace(SMALL, mup=MuP(base_width=16, embedding_multiplier=3.0, depth="completep")),
        "norm of each head", "window", "biases", "gated attention", "softcaps",
    ),
}  # fmt: skip
Z_COEFFICIENT = 0.3


def model_of(shape: LlamaShape) -> Decoder:
    """Weights large enough that attention is far from uniform and softcaps bend, gains and biases that differ."""
    model = Decoder(shape, V, init_std=0.25, z_loss_coefficient=Z_COEFFICIENT).double()
    model.init_weights(3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += torch.empty_like(parameter).uniform_(-0.5, 0.5, generator=generator)
    return model


def given() -> tuple[Tensor, Tensor]:
    drawn = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(0))
    labels = drawn[:, 1:].clone()
    labels[0, 3:6] = IGNORE_INDEX
    return drawn[:, :-1], labels


def plain_logits(shape: LlamaShape, w: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """The logits, as the papers write them: one head and one query at a time."""
    x = w["tok_embeddings.weight"][tokens]
    if shape.scaled_embeddings:
        x = x * math.sqrt(shape.dim)
    elif shape.mup:
        x = x * shape.mup.embedding_multiplier
    branch = 1.0 if shape.mup is None else shape.mup.residual_multiplier
    if shape.mup is not None and shape.mup.depth == "completep":
        branch *= shape.mup.base_layers / shape.layers
    for i in range(shape.layers):

        def norm(x: Tensor, name: str, prefix: str = f"layers.{i}.") -> Tensor:
            gain = w[f"{prefix}{name}.weight"] + (1 if shape.zero_centered_norm else 0)
            return x / (x.square().mean(-1, keepdim=True) + shape.norm_eps).sqrt() * gain

        pre, post = shape.norm_placement in ("pre", "both"), shape.norm_placement in ("post", "both")
        out = attention(shape, w, i, norm(x, "attention_norm") if pre else x, norm)
        x = x + branch * (norm(out, "attention_post_norm") if post else out)
        h = norm(x, "ffn_norm") if pre else x
        gate, up, down = (w[f"layers.{i}.feed_forward.{name}.weight"] for name in ("w_gate", "w_up", "w_down"))
        z = h @ gate.T
        inner = math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)
        bent = z / 2 * (1 + inner.tanh()) if shape.activation == "gelu_tanh" else z / (1 + (-z).exp())
        out = (bent * (h @ up.T)) @ down.T
        x = x + branch * (norm(out, "ffn_post_norm") if post else out)
    x = norm(x, "norm", "")
    if shape.mup is not None:
        x = x / (shape.dim / shape.mup.base_width)
    z = x @ w["output.weight"].T
    return shape.logit_softcap * (z / shape.logit_softcap).tanh() if shape.logit_softcap else z


def attention(shape: LlamaShape, w: dict[str, Tensor], i: int, x: Tensor, norm) -> Tensor:
    heads, width, prefix = shape.heads, shape.head_width, f"layers.{i}.attention"

    def project(name: str) -> Tensor:
        return x @ w[f"{prefix}.{name}.weight"].T + w.get(f"{prefix}.{name}.bias", 0.0)

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, width))

    is_global = not shape.sliding_window or (
        shape.global_attention_interval > 0
        and i % shape.global_attention_interval == shape.global_attention_interval - 1
    )
    q, k, v = project("wq"), project("wk"), split(project("wv"))
    if shape.qk_norm == "all_heads":
        q, k = norm(q, "attention.q_norm"), norm(k, "attention.k_norm")
    q, k = split(q), split(k)
    if shape.qk_norm == "per_head":
        q, k = norm(q, "attention.q_norm"), norm(k, "attention.k_norm")
    if not (shape.no_rope_interval and i % shape.no_rope_interval == shape.no_rope_interval - 1):
        q, k = rotate(shape, q, is_global), rotate(shape, k, is_global)
    if shape.qk_norm == "per_head_after_rope":
        q, k = norm(q, "attention.q_norm"), norm(k, "attention.k_norm")
    scale = shape.attention_scale or (1 / math.sqrt(width) if shape.mup is None else 1 / width)
    out = torch.zeros(*x.shape[:2], heads, width, dtype=x.dtype)
    for head in range(heads):
        of = head * shape.kv_heads // heads
        for t in range(x.shape[1]):
            first = 0 if is_global else max(0, t - shape.sliding_window + 1)
            logits = (q[:, t, head, None] * k[:, first : t + 1, of]).sum(-1) * scale
            if shape.attention_softcap:
                logits = shape.attention_softcap * (logits / shape.attention_softcap).tanh()
            out[:, t, head] = (logits.softmax(-1)[..., None] * v[:, first : t + 1, of]).sum(1)
    out = out.flatten(2)
    if shape.gated_attention:
        out = out / (1 + (-(x @ w[f"{prefix}.wg.weight"].T)).exp())
    return out @ w[f"{prefix}.wo.weight"].T


def rotate(shape: LlamaShape, x: Tensor, is_global: bool) -> Tensor:
    """Channel pairs as complex numbers, turned by their position."""
    width = int(shape.head_width * shape.partial_rotary_factor)
    own = not is_global and shape.rope_local_theta
    theta = shape.rope_local_theta if own else shape.rope_theta
    frequencies = torch.tensor([theta ** (-2 * c / width) for c in range(width // 2)], dtype=x.dtype)
    factor = 1.0
    if shape.rope_scaling is not None and not own:  # YaRN, equations 18 to 25 of arXiv 2309.00071, with whole channels
        scaling = shape.rope_scaling
        factor = 0.1 * math.log(scaling.factor) + 1

        def channel(turns: float) -> float:
            return width * math.log(scaling.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = max(math.floor(channel(32)), 0), min(math.ceil(channel(1)), width - 1)
        ramp = ((torch.arange(width // 2) - low) / max(high - low, 0.001)).clamp(0, 1).double()
        frequencies = frequencies / scaling.factor * ramp + frequencies * (1 - ramp)
    angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * frequencies
    turned = torch.complex(x[..., : width // 2], x[..., width // 2 : width]) * torch.polar(
        torch.full_like(angle, factor), angle
    ).unsqueeze(1)
    return torch.cat((turned.real, turned.imag, x[..., width:]), -1)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_loss_and_gradients_are_those_of_a_plain_computation(shape):
    model, (tokens, labels) = model_of(shape), given()
    weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    logits = plain_logits(shape, weights, tokens)
    # the tables of RoPE are float32
    torch.testing.assert_close(model(tokens), logits, rtol=0, atol=2e-6)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    loss = model(tokens, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    counted = labels != IGNORE_INDEX
    z_loss = logits.logsumexp(-1)[counted].square().sum()
    loss.backward()
    (expected + Z_COEFFICIENT * z_loss).backward()
    for name, parameter in model.named_parameters():
        grad = weights[name].grad
        assert grad.norm() > 0, name
        assert (parameter.grad - grad).norm() < 2e-6 * grad.norm() + 1e-9, name
    assert model.metrics_of(model.pop_metric_sums())["z_loss"] == pytest.approx(float(z_loss / counted.sum()), rel=1e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_changes_the_function(name):
    """Else the comparisons above could not fail."""
    model, (tokens, _) = model_of(shape_with(SMALL, name)), given()
    llama = model_of(SMALL)
    llama.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        assert (model(tokens) - llama(tokens)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("length", "window"), [(200, 3), (200, 64), (200, 70), (129, 65), (65, 64), (64, 80), (70, 69)]
)
def test_a_window_of_any_length_is_a_masked_attention(length, window):
    """Chunks of 64 queries or of a window, whichever is larger."""
    shape = replace(SMALL, layers=1, sliding_window=window)
    model = model_of(shape)
    q, k, v = (torch.randn(B, heads, length, 8, dtype=torch.float64) for heads in (4, 2, 2))
    distance = torch.arange(length)[:, None] - torch.arange(length)
    mask = (distance >= 0) & (distance < window)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(causal_attention(q, k, v, model.layers["0"].attention.rule), expected)


@pytest.mark.parametrize("name", ["combination 1", "combination 2"])
def test_blocks_compile_as_a_whole(name):
    """One graph for each kind of layer: with a window or global, rotated or not."""
    shape = SHAPES[name]
    kinds = {(shape.window_of(layer), shape.rotates(layer)) for layer in range(shape.layers)}
    eager, compiled, counter = model_of(shape), model_of(shape), CompileCounter()
    for layer in compiled.layers.values():
        layer.compile(backend=counter, fullgraph=True)
    tokens, _ = given()
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens), eager(tokens))
        assert counter.frame_count == len(kinds)
        compiled(tokens.roll(1, 1))
    assert counter.frame_count == len(kinds), "compiled again"


@pytest.mark.parametrize(("window", "softcap", "asked"), [(0, 0.0, 0), (T, 0.0, 0), (3, 0.0, 1), (0, 2.0, 1)])
def test_flex_attention_is_prepared_only_where_a_layer_needs_it(window, softcap, asked, monkeypatch):
    """Else a plain Llama would compile a mask that it does not use."""
    calls = []
    monkeypatch.setattr("models.attention_backends.has_flex_attention", lambda *_: True)
    monkeypatch.setattr("models.attention_backends.sequence_attention", lambda *arguments: calls.append(arguments))
    model_of(replace(SMALL, sliding_window=window, attention_softcap=softcap))(given()[0])
    assert len(calls) == asked


def test_flops_count_only_the_keys_of_a_window():
    full, windowed = Decoder(SMALL, V), Decoder(replace(SMALL, sliding_window=8, global_attention_interval=2), V)
    assert windowed.flops_per_token(8) == full.flops_per_token(8)
    saved = full.flops_per_token(100) - windowed.flops_per_token(100)
    assert saved == 12 * SMALL.heads * SMALL.head_width * 2 * (100 - 8)
