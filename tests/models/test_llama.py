"""The `[model]` section: every number can be overridden, and a shape that cannot be is refused with a remedy."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import get_args

import pytest
import torch

from models.decoder import Decoder
from models.llama import Llama
from models.mup import MuPConfig
from models.norm import RMSNorm
from models.presets import PRESETS, Activation, LlamaShape, NormPlacement, QKNorm
from models.rope import Rope, RopeScaling
from models.router_loss import RouterLossConfig

pytestmark = pytest.mark.quick

OTHER = {
    "dim": 96,
    "layers": 3,
    "heads": 8,
    "kv_heads": 4,
    "ffn_dim": 100,
    "head_dim": 12,
    "norm_eps": 1e-3,
    "rope_theta": 77.0,
    "rope_scaling": RopeScaling(factor=2.0),
    "tied_embeddings": True,
    "max_sequence_length": 17,
    "activation": "gelu_tanh",
    "norm_placement": "both",
    "zero_centered_norm": True,
    "scaled_embeddings": True,
    "qkv_bias": True,
    "qk_norm": "per_head",
    "gated_attention": True,
    "attention_scale": 0.3,
    "attention_softcap": 40.0,
    "logit_softcap": 20.0,
    "sliding_window": 8,
    "partial_rotary_factor": 0.5,
    "no_rope_interval": 2,
}
EXPERTS = {"experts": 6, "top_k": 3}
"""These two go together."""
OF_A_WINDOW = {"global_attention_interval": 3, "rope_local_theta": 50.0}
"""These need a window."""


def test_every_number_of_a_size_has_another_value_here():
    assert OTHER.keys() == {field.name for field in fields(LlamaShape)} - {
        "mup",
        *EXPERTS,
        *OF_A_WINDOW,
    }  # tests/models/test_mup.py
    assert all(getattr(PRESETS["debug"], key) != value for key, value in OTHER.items())


@pytest.mark.parametrize("key", OTHER)
def test_a_key_overrides_its_number_and_no_other(key):
    assert Llama(**{key: OTHER[key]}).resolved_shape == replace(PRESETS["debug"], **{key: OTHER[key]})


def test_keys_of_a_window_override_theirs():
    shape = replace(PRESETS["debug"], sliding_window=8, **OF_A_WINDOW)
    assert Llama(sliding_window=8, **OF_A_WINDOW).resolved_shape == shape
    assert [shape.window_of(layer) for layer in range(6)] == [8, 8, 0, 8, 8, 0]
    assert Llama(size="gemma3_1b", sliding_window=0, **dict.fromkeys(OF_A_WINDOW, 0)).resolved_shape.window_of(0) == 0


def test_experts_can_be_given_to_a_size_and_taken_from_one():
    assert Llama(**EXPERTS).resolved_shape == replace(PRESETS["debug"], **EXPERTS)
    assert Llama(size="powermoe3b", top_k=2).resolved_shape == replace(PRESETS["powermoe3b"], top_k=2)
    dense = Llama(size="powermoe3b", layers=1, experts=0).build(vocab_size=9, sequence_length=5)
    assert {name.split(".")[-2] for name in dense.state_dict() if "feed_forward" in name} == {
        "w_gate",
        "w_up",
        "w_down",
    }


@pytest.mark.parametrize("name", PRESETS)
def test_a_name_alone_is_its_row(name):
    assert Llama(size=name).resolved_shape == PRESETS[name]


def test_overrides_reach_the_decoder():
    model = Llama(**OTHER, vocab_size=50, init_std=0.5, depth_scaled_init=False).build(vocab_size=40, sequence_length=9)
    assert {name: tuple(p.shape) for name, p in model.named_parameters() if not name.startswith("layers.")} == {
        "tok_embeddings.weight": (50, 96),
        "norm.weight": (96,),
    }
    assert list(model.layers) == ["0", "1", "2"]
    assert {name: tuple(p.shape) for name, p in model.layers["0"].named_parameters()} == {
        "attention_norm.weight": (96,),
        "attention.wq.weight": (96, 96),
        "attention.wq.bias": (96,),
        "attention.wk.weight": (48, 96),
        "attention.wk.bias": (48,),
        "attention.wv.weight": (48, 96),
        "attention.wv.bias": (48,),
        "attention.wo.weight": (96, 96),
        "attention.wg.weight": (96, 96),
        "attention.q_norm.weight": (12,),
        "attention.k_norm.weight": (12,),
        "attention_post_norm.weight": (96,),
        "ffn_norm.weight": (96,),
        "ffn_post_norm.weight": (96,),
        "feed_forward.w_gate.weight": (100, 96),
        "feed_forward.w_up.weight": (100, 96),
        "feed_forward.w_down.weight": (96, 100),
    }
    assert {module.eps for name, module in model.named_modules() if isinstance(module, RMSNorm)} == {1e-3}
    assert model.rope.frequencies() == Rope(6, 77.0, RopeScaling(factor=2.0)).frequencies()
    assert (model.init_std, model.depth_scaled_init) == (0.5, False)


def test_a_variant_of_a_preset_can_be_switched_off():
    """The TOML value "none" unsets a key, which is then that of the preset."""
    shape = Llama(size="qwen3_0.6b", qk_norm="off", sliding_window=0).resolved_shape
    assert (shape.qk_norm, shape.sliding_window) == ("off", 0)
    assert "none" not in (*get_args(QKNorm), *get_args(Activation), *get_args(NormPlacement))


def test_an_override_of_false_is_an_override():
    assert Llama(size="llama3_1b", tied_embeddings=False).resolved_shape.tied_embeddings is False


def test_a_factor_of_one_switches_the_scaling_of_a_size_off():
    shape = Llama(size="llama3_1b", rope_scaling=RopeScaling(factor=1)).resolved_shape
    frequencies = Rope(shape.head_width, shape.rope_theta, shape.rope_scaling).frequencies()
    assert frequencies == pytest.approx(Rope(64, 500_000.0).frequencies(), rel=1e-15)


def test_head_dim_follows_an_overridden_dim_unless_given():
    assert Llama(size="llama3_1b", dim=1024).resolved_shape.head_width == 32
    assert Llama(size="llama3_1b", dim=1024, head_dim=64).resolved_shape.head_width == 64


def test_the_vocabulary_is_the_tokenizers_unless_padded():
    assert Llama().build(vocab_size=300, sequence_length=8).vocab_size == 300
    assert Llama(vocab_size=384).build(vocab_size=300, sequence_length=8).vocab_size == 384
    assert Llama(vocab_size=300).build(vocab_size=300, sequence_length=8).vocab_size == 300


def test_the_largest_size_is_built_on_meta_without_memory():
    with torch.device("meta"):
        model = Llama(size="llama3_8b").build(vocab_size=128_256, sequence_length=8192)
    assert isinstance(model, Decoder)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"heads": 32, "kv_heads": 5}, r"^kv_heads: 5 does not divide the 32 heads; use 4$"),
        ({"heads": 4, "kv_heads": 9}, r"^kv_heads: 9 does not divide the 4 heads; use 4$"),
        ({"heads": 6}, r"^heads: 6 does not divide dim = 128; use 4, or set head_dim$"),
        ({"head_dim": 31}, r"^head_dim: 31 is odd, .*; use 32$"),
        ({"dim": 100, "heads": 4}, r"^head_dim: 25 is odd, .*; use 26$"),
        ({"norm_eps": 0.0}, r"^norm_eps: 0.0 must be above 0$"),
        ({"norm_eps": float("nan")}, r"^norm_eps: nan must be above 0$"),
        ({"rope_theta": -1.0}, r"^rope_theta: -1.0 must be above 0$"),
        ({"init_std": 0.0}, r"^init_std: 0.0 must be above 0$"),
        ({"experts": 4}, r"^top_k: required with experts; use 1 to 4$"),
        ({"experts": 4, "top_k": 5}, r"^top_k: 5 of 4 experts; use 1 to 4$"),
        ({"global_attention_interval": 2}, r"^global_attention_interval: has no effect without a window"),
        ({"rope_local_theta": 5.0}, r"^rope_local_theta: has no effect without a window; set sliding_window, or"),
        ({"sliding_window": 8, "global_attention_interval": 1}, r"^global_attention_interval: 1 makes every layer"),
        ({"no_rope_interval": 1}, r"^no_rope_interval: 1 leaves no layer with rotary embedding; use at least 2$"),
        ({"logit_softcap": -1.0}, r"^logit_softcap: -1.0 must be a finite number of at least 0, which disables it$"),
        ({"partial_rotary_factor": 0.0}, r"^partial_rotary_factor: 0.0 must be above 0 and at most 1$"),
        ({"partial_rotary_factor": 0.1}, r"^partial_rotary_factor: 3 of 32 channels .*; use 0.125, which is 4$"),
        ({"partial_rotary_factor": 0.01}, r"^partial_rotary_factor: 0 of 32 channels .*; use 0.0625, which is 2$"),
        (
            {"head_dim": 96, "partial_rotary_factor": 0.33},
            r"^partial_rotary_factor: 31 of 96 channels .*; use 0.3333333333333333, which is 32$",
        ),
        ({"logit_softcap": math.inf}, r"^logit_softcap: inf must be a finite number of at least 0"),
        ({"mup": MuPConfig(base_layers=4)}, r"^mup: base_layers has no effect without depth"),
        ({"rope_theta": 1.0, "rope_scaling": RopeScaling(type="yarn")}, r"^rope_theta: 1.0 must be above 1 with YaRN"),
        (
            {"size": "powerlm36m", "scaled_embeddings": True},
            r"^scaled_embeddings: a factor of sqrt\(dim\) .*; use mup.embedding_multiplier$",
        ),
        ({"top_k": 2}, r"^top_k: has no effect without experts; set experts, or remove top_k$"),
        ({"router": RouterLossConfig()}, r"^router: has no effect without experts; set experts, or remove router$"),
    ],
)
def test_a_shape_that_cannot_be_is_refused_with_a_remedy(wrong, message):
    with pytest.raises(ValueError, match=message):
        Llama(**wrong)


@pytest.mark.parametrize("width", range(2, 130, 2))
def test_the_fraction_that_an_error_suggests_is_accepted(width):
    with pytest.raises(ValueError, match="partial_rotary_factor") as caught:
        Llama(head_dim=width, partial_rotary_factor=1.5 / width)
    suggested = float(str(caught.value).split("use ")[1].split(",")[0])
    assert Llama(head_dim=width, partial_rotary_factor=suggested).resolved_shape.rotary_width == 2


def test_heads_need_not_divide_dim_when_their_width_is_given():
    model = Llama(heads=6, kv_heads=3, head_dim=20, layers=1).build(vocab_size=9, sequence_length=5)
    assert model(torch.arange(5)[None]).shape == (1, 5, 9)


def test_a_vocabulary_below_the_tokenizers_is_refused():
    with pytest.raises(
        ValueError, match=r"^vocab_size: 299 is too small for the tokenizer's 300 ids; use at least 300"
    ):
        Llama(vocab_size=299).build(vocab_size=300, sequence_length=8)


def test_a_sequence_longer_than_the_model_accepts_is_refused():
    Llama(max_sequence_length=64).build(vocab_size=9, sequence_length=64)
    with pytest.raises(ValueError, match=r"^max_sequence_length: 64 is below training.sequence_length = 65"):
        Llama(max_sequence_length=64).build(vocab_size=9, sequence_length=65)
