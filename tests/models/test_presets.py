"""Named sizes against the published configurations and parameter counts."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from models.decoder import Decoder
from models.hf.architectures import architecture_from_model
from models.presets import PRESETS, PresetName

pytestmark = pytest.mark.quick

LLAMA3 = {"rms_norm_eps": 1e-5, "vocab_size": 128256, "max_position_embeddings": 131072}
LAU = {"vocab_size": 32000, "max_position_embeddings": 2048, "tie_word_embeddings": False}
POWER = {"vocab_size": 49152, "max_position_embeddings": 4096, "tie_word_embeddings": True, "head_dim": 64}
# fmt: off
PUBLISHED = {  # their config.json; of PowerLM and PowerMoE, the tables of arXiv 2408.13359
    "microllama300m": LAU | {
        "hidden_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 16, "num_key_value_heads": 4,
        "intermediate_size": 5632, "head_dim": 64, "rms_norm_eps": 1e-5},
    "tinyllama1b": LAU | {
        "hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
        "intermediate_size": 5632, "head_dim": 64, "rms_norm_eps": 1e-5},
    "openllama3b": LAU | {
        "hidden_size": 3200, "num_hidden_layers": 26, "num_attention_heads": 32, "num_key_value_heads": 32,
        "intermediate_size": 8640, "head_dim": 100, "rms_norm_eps": 1e-6},
    "llama3_1b": LLAMA3 | {
        "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 8192, "head_dim": 64, "tie_word_embeddings": True},
    "llama3_3b": LLAMA3 | {
        "hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8,
        "intermediate_size": 8192, "head_dim": 128, "tie_word_embeddings": True},
    "llama3_8b": LLAMA3 | {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14336, "head_dim": 128, "tie_word_embeddings": False},
    "powerlm12m": POWER | {
        "hidden_size": 128, "num_hidden_layers": 32, "num_attention_heads": 2, "num_key_value_heads": 2,
        "intermediate_size": 320},
    "powerlm36m": POWER | {
        "hidden_size": 256, "num_hidden_layers": 32, "num_attention_heads": 4, "num_key_value_heads": 4,
        "intermediate_size": 640},
    "powerlm121m": POWER | {
        "hidden_size": 512, "num_hidden_layers": 32, "num_attention_heads": 8, "num_key_value_heads": 8,
        "intermediate_size": 1280},
    "powerlm1b": POWER | {
        "hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24, "num_key_value_heads": 24,
        "intermediate_size": 4096},
    "powerlm3b": POWER | {
        "hidden_size": 2304, "num_hidden_layers": 40, "num_attention_heads": 36, "num_key_value_heads": 36,
        "intermediate_size": 9216},
    "powermoe1b": POWER | {
        "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 8,
        "intermediate_size": 512, "num_local_experts": 32, "num_experts_per_tok": 8},
    "powermoe3b": POWER | {
        "hidden_size": 1536, "num_hidden_layers": 32, "num_attention_heads": 24, "num_key_value_heads": 8,
        "intermediate_size": 512, "num_local_experts": 40, "num_experts_per_tok": 8},
    "qwen3_0.6b": {
        "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
        "intermediate_size": 3072, "head_dim": 128, "tie_word_embeddings": True, "rms_norm_eps": 1e-6,
        "vocab_size": 151936, "max_position_embeddings": 40960},
    "olmo2_1b": {
        "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16,
        "intermediate_size": 8192, "head_dim": 128, "tie_word_embeddings": False, "rms_norm_eps": 1e-6,
        "vocab_size": 100352, "max_position_embeddings": 4096},
    "gemma3_1b": {
        "hidden_size": 1152, "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1,
        "intermediate_size": 6912, "head_dim": 256, "tie_word_embeddings": True, "rms_norm_eps": 1e-6,
        "vocab_size": 262144, "max_position_embeddings": 32768, "sliding_window": 512},
}
PARAMETERS = {  # of Llama 3 as published; all others, published as 304.6M, 1100.0M, 3426.5M, 12M ... 3.30B, to the unit
    "microllama300m": 304_636_928,
    "tinyllama1b":    1_100_048_384,
    "openllama3b":    3_426_473_600,
    "llama3_1b":      1_235_814_400,
    "llama3_3b":      3_212_749_824,
    "llama3_8b":      8_030_261_248,
    "powerlm12m":     12_329_088,
    "powerlm36m":     36_716_800,
    "powerlm121m":    121_668_096,
    "powerlm1b":      1_208_083_968,
    "powerlm3b":      3_510_819_072,
    "powermoe1b":     1_334_625_280,
    "powermoe3b":     3_298_788_864,
    "qwen3_0.6b":     596_049_920,
    "olmo2_1b":       1_484_916_736,
    "gemma3_1b":      999_885_952,
}
ACTIVE = {"powermoe1b": 377e6, "powermoe3b": 800e6}
MULTIPLIERS = {  # m_width, m_emb, m_res; of PowerLM-3B the paper prints a width of 8, but 2304 / 256 = 9
    "powerlm12m": (0.5, 12, 0.26), "powerlm36m": (1, 12, 0.26), "powerlm121m": (2, 12, 0.26),
    "powerlm1b": (6, 12, 0.22), "powerlm3b": (9, 12, 0.22),
    "powermoe1b": (4, 12, 0.28), "powermoe3b": (6, 12, 0.22),
}
THETA = {"qwen3_0.6b": 1e6, "olmo2_1b": 5e5, "gemma3_1b": 1e6}
GAINS = {"qwen3_0.6b": 2 * 128, "olmo2_1b": 2 * 2048, "gemma3_1b": 2 * 256 + 2 * 1152}
"""Gains of norms in a layer, beside those of Llama."""
SCALING = {"llama3_1b": 32.0, "llama3_3b": 32.0, "llama3_8b": 8.0}
# fmt: on


def test_every_named_size_is_in_the_table_and_checked_here():
    assert set(get_args(PresetName)) == set(PRESETS) == {"debug", *PUBLISHED} == {"debug", *PARAMETERS}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_size_has_the_dimensions_of_its_published_configuration(name):
    with torch.device("meta"):
        model = Decoder(PRESETS[name], PUBLISHED[name]["vocab_size"])
    config = architecture_from_model(model)[1].hf_config(model)
    assert {key: config[key] for key in PUBLISHED[name]} == PUBLISHED[name]
    rope = {"rope_type": "default", "rope_theta": THETA.get(name, 10_000.0)}
    if name in SCALING:
        rope = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": SCALING[name]}
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    if name == "gemma3_1b":
        rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0}}
    assert config["rope_parameters"] == rope


def closed_form(c: dict, gains: int) -> int:
    """Parameters of a Llama from its configuration: embeddings, then attention, feed-forward and two norms a layer."""
    d, width = c["hidden_size"], c["head_dim"]
    attention = 2 * d * width * (c["num_attention_heads"] + c["num_key_value_heads"])
    experts = c.get("num_local_experts", 0)
    layer = attention + 3 * d * c["intermediate_size"] * max(experts, 1) + d * experts + 2 * d + gains
    return c["vocab_size"] * d * (1 if c["tie_word_embeddings"] else 2) + c["num_hidden_layers"] * layer + d


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_size_has_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = Decoder(PRESETS[name], PUBLISHED[name]["vocab_size"])
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    assert closed_form(PUBLISHED[name], GAINS.get(name, 0)) == PARAMETERS[name]


@pytest.mark.parametrize("name", ACTIVE)
def test_a_token_meets_the_published_number_of_parameters(name):
    """In the layers: the paper counts neither embeddings nor, to three digits, routers."""
    size = PRESETS[name]
    with torch.device("meta"):
        model = Decoder(size, PUBLISHED[name]["vocab_size"])
    routers = size.layers * size.experts * size.dim
    assert model.active_parameters() - routers == pytest.approx(ACTIVE[name], rel=0.01)
    experts = 3 * size.dim * size.ffn_dim * size.layers
    dense = PARAMETERS[name] - experts * (size.experts - size.top_k) - (2 * size.layers + 1) * size.dim
    assert model.active_parameters() == dense - size.dim * 49152


def test_debug_has_a_million_parameters_beside_its_embeddings():
    model = Decoder(PRESETS["debug"], 7)
    assert sum(parameter.numel() for parameter in model.parameters()) - 2 * 7 * 128 == 1_181_312


@pytest.mark.parametrize("name", PRESETS)
def test_a_size_has_the_published_multipliers_or_none(name):
    size = PRESETS[name]
    mup = size.mup
    found = mup and (mup.width_multiple(size.dim), mup.embedding_multiplier, mup.residual_multiplier)
    assert found == MULTIPLIERS.get(name)
