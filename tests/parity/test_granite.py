"""With muP and the same weights, logits and gradients equal those of `transformers.GraniteForCausalLM`."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from models.decoder import Decoder
from models.hf.config import hf_config
from models.hf.weights import hf_names
from models.mup import MuP
from models.presets import PRESETS, LlamaShape
from tests.models.hf.state_dicts import to_hf

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[hf]'")

V, B, T = 97, 2, 80
SMALL = LlamaShape(dim=96, layers=2, heads=4, kv_heads=4, ffn_dim=96)
MUP = MuP(base_width=32, embedding_multiplier=5.0, residual_multiplier=0.3)
SHAPES = {
    "m_width 3": replace(SMALL, mup=MUP),
    "narrower than the base, grouped heads": replace(SMALL, kv_heads=2, mup=replace(MUP, base_width=256)),
    "tied head, wide heads": replace(SMALL, head_dim=40, tied_embeddings=True, mup=MUP),
    "multipliers of one": replace(SMALL, mup=MuP(base_width=96)),
    # one key-value head for each of two query heads, two layers; with the published multipliers
    **{
        f"shrunk {name}": replace(size, dim=128, layers=2, heads=2, kv_heads=2, ffn_dim=96)
        for name, size in PRESETS.items()
        if size.mup is not None and not size.experts
    },
}
shapes = pytest.mark.parametrize("size", SHAPES.values(), ids=SHAPES)


def pair(size: LlamaShape) -> tuple[Decoder, nn.Module]:
    """Return our model and theirs. Logits spread over some units and norm gains differ, so any mix-up is visible."""
    mup = size.mup
    ours = Decoder(size, V, init_std=1.5 / math.sqrt(mup.base_width), depth_scaled_init=False)
    ours.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name == "norm.weight":  # otherwise logits would get flatter in wider models
                parameter.fill_(math.sqrt(size.dim / mup.base_width))
            if "norm" in name:
                parameter *= torch.empty_like(parameter).uniform_(0.5, 1.5, generator=generator)
    config = transformers.GraniteConfig(**hf_config(size, V), attn_implementation="eager")
    theirs = transformers.GraniteForCausalLM(config).eval()
    result = theirs.load_state_dict(to_hf(ours.state_dict(), size), strict=False)
    assert result.unexpected_keys == []
    assert result.missing_keys == (["lm_head.weight"] if size.tied_embeddings else [])
    return ours, theirs


def given() -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(2))
    return drawn[:, :-1], drawn[:, 1:]


@shapes
def test_logits_are_equal(size):
    ours, theirs = pair(size)
    tokens, _ = given()
    with torch.no_grad():
        mine, reference = ours(tokens), theirs(tokens).logits
    assert reference.std() > 1, "else the tolerance says nothing"
    torch.testing.assert_close(mine, reference, rtol=0, atol=1e-4)  # float32


@shapes
def test_loss_and_the_gradient_of_every_parameter_are_equal(size):
    ours, theirs = pair(size)
    tokens, labels = given()
    loss = ours(tokens, labels)
    reference = nn.functional.cross_entropy(theirs(tokens).logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=0)  # float32
    loss.backward()
    reference.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        grad = gradients[hf_names(size)[name]]
        # requirement: 1e-3 of the norm
        assert grad.norm() > 0 and (parameter.grad - grad).norm() < 1e-4 * grad.norm(), name
