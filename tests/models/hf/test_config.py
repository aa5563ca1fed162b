"""A `config.json` and `[model]` say the same, or the difference is refused."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from benchmarks.parity import draw_shape
from models.decoder import Decoder
from models.hf.architectures import (
    ARCHITECTURES,
    architecture_from_config,
    architecture_from_model,
    match_tensors,
    part_shapes,
)
from models.hf.config import granite_keys, granite_moe_keys, llama_keys
from models.presets import PRESETS, LlamaShape
from models.rope import RopeScaling

pytestmark = pytest.mark.quick

LLAMA = ARCHITECTURES["LlamaForCausalLM"]
SMALL = LlamaShape(dim=64, layers=2, heads=4, kv_heads=2, ffn_dim=96)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def decoder(size: LlamaShape) -> Decoder:
    with torch.device("meta"):
        return Decoder(size, 97)


SHAPES = {
    **{name: replace(size, layers=6) for name, size in PRESETS.items()},
    **{
        f"{family} {seed}": draw_shape(family, random.Random(f"{family} {seed}").choice)
        for family in ARCHITECTURES
        for seed in range(5)
    },
}


@pytest.mark.parametrize("size", SHAPES.values(), ids=SHAPES)
def test_a_written_config_reads_back_as_the_same_model(size):
    _, architecture = architecture_from_model(decoder(size))
    entries = architecture.hf_config(decoder(size))
    with torch.device("meta"):
        back = architecture.build(architecture.config_from_hf(entries))
    assert architecture_from_model(back)[1] is architecture
    assert {**architecture.hf_config(back), "initializer_range": 0, "router_aux_loss_coef": 0} == {
        **entries, "initializer_range": 0, "router_aux_loss_coef": 0
    }  # fmt: skip
    # keys with several spellings of the same function
    spelled = {key: getattr(size, key) for key in ("head_dim", "rope_scaling", "mup", "max_sequence_length")}
    if size.sliding_window >= 0 and not any(map(size.window_of, range(size.layers))):
        spelled |= {"sliding_window": size.sliding_window, "global_attention_interval": size.global_attention_interval}
        spelled |= {"rope_local_theta": size.rope_local_theta}
    if not any(not size.window_of(layer) for layer in range(size.layers)):
        spelled |= {"global_attention_interval": size.global_attention_interval}
    assert replace(back.shape, **spelled) == size
    assert back.shape.head_width == size.head_width
    assert back.vocab_size == 97


def test_the_presets_of_families_are_theirs():
    found = {name: architecture_from_model(decoder(replace(size, layers=2)))[0] for name, size in PRESETS.items()}
    assert found["qwen3_0.6b"] == "Qwen3ForCausalLM"
    assert found["olmo2_1b"] == "Olmo2ForCausalLM"
    assert found["gemma3_1b"] == "Gemma3ForCausalLM"
    assert found["powermoe3b"] == "GraniteMoeForCausalLM"
    assert found["powerlm3b"] == "GraniteForCausalLM"
    assert found["llama3_8b"] == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ({"gated_attention": True}, "the closest of 11 .* is LlamaForCausalLM, which does not have gated_attention"),
        ({"no_rope_interval": 2, "qkv_bias": True}, "Qwen2ForCausalLM, which does not have no_rope_interval = 2"),
        ({"qk_norm": "per_head_after_rope"}, "which does not have qk_norm = 'per_head_after_rope'"),
    ],
)
def test_variants_that_transformers_does_not_have_are_named(variants, message):
    with pytest.raises(ValueError, match=message):
        architecture_from_model(decoder(replace(SMALL, **variants)))


HUB = {
    # the entries that matter, as published
    "qwen3_0.6b": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
        "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
        "use_sliding_window": False, "vocab_size": 151936,
    },
    "olmo2_1b": {
        "architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 8192, "max_position_embeddings": 4096, "num_attention_heads": 16,
        "num_hidden_layers": 16, "num_key_value_heads": 16, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 500000, "tie_word_embeddings": False, "vocab_size": 100352,
    },
    "gemma3_1b": {
        "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attn_logit_softcapping": None,
        "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152, "intermediate_size": 6912, "max_position_embeddings": 32768, "num_attention_heads": 4,
        "num_hidden_layers": 26, "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
        "sliding_window_pattern": 6, "vocab_size": 262144,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_the_published_configuration_is_the_preset(name):
    _, architecture = architecture_from_config(HUB[name])
    with torch.device("meta"):
        model = architecture.build(architecture.config_from_hf(HUB[name]))
    assert model.shape == replace(PRESETS[name], head_dim=model.shape.head_dim)
    assert model.shape.head_width == PRESETS[name].head_width


@pytest.mark.parametrize(
    ("name", "entries", "message"),
    [
        ("gemma3_1b", {"layer_types": ["full_attention"] + ["sliding_attention"] * 25}, "only every n-th layer"),
        ("gemma3_1b", {"layer_types": ["linear_attention"] * 26}, "layer_types is not a list of 26 times"),
        ("gemma3_1b", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not supported"),
        ("gemma3_1b", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("gemma3_1b", {"hidden_activation": "silu"}, "hidden_activation = 'silu'"),
        ("olmo2_1b", {"attention_bias": True}, "attention_bias = True"),
        (
            "qwen3_0.6b",
            {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 0},
            "sliding_window = 0 is not an integer",
        ),
        ("qwen3_0.6b", {"rope_scaling": {"rope_type": "longrope"}}, "rope_type = 'longrope' is not supported"),
        (
            "qwen3_0.6b",
            {
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 2,
                    "original_max_position_embeddings": 9,
                    "truncate": False,
                }
            },
            "truncate = False",
        ),
        ("qwen3_0.6b", {"rope_parameters": {"full_attention": 3}}, "not a table"),
        ("qwen3_0.6b", {"is_causal": False}, "is_causal = False is not supported"),
        ("qwen3_0.6b", {"hidden_activation": "silu", "hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        (
            "qwen3_0.6b",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": {"type": "linear"}},
            "rope_scaling and rope_parameters differ",
        ),
        ("qwen3_0.6b", {"rope_scaling": {"type": ["yarn"]}}, "rope_type = .'yarn'. is not supported"),
        (
            "qwen3_0.6b",
            {"rope_theta": 1, "rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 9}},
            "rope_theta = 1 must be above 1 with YaRN",
        ),
        (
            "qwen3_0.6b",
            {
                "original_max_position_embeddings": 8,
                "rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 9},
            },
            "original_max_position_embeddings differs",
        ),
        (
            "qwen3_0.6b",
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": "3"},
            "max_window_layers",
        ),
        ("gemma3_1b", {"layer_types": [["x"]] * 26}, "layer_types is not a list"),
        ("gemma3_1b", {"query_pre_attn_scalar": 0.4}, "query_pre_attn_scalar = 0.4 is not an integer"),
        ("gemma3_1b", {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "has no full_attention"),
        (
            "qwen3_0.6b",
            {"rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_theta": 5.0}}},
            "this one depends on the layer",
        ),
    ],
)
def test_what_a_family_has_and_the_decoder_has_not_is_refused_by_name(name, entries, message):
    config = {**HUB[name], **entries}
    with pytest.raises(ValueError, match=message):
        architecture_from_config(config)[1].config_from_hf(config)


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("gemma3_1b", {"layer_types": ["full_attention"] * 26}),
        ("gemma3_1b", {"sliding_window_pattern": 1}),
        ("qwen3_0.6b", {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": None}),
        ("qwen3_0.6b", {"architectures": ["MistralForCausalLM"], "sliding_window": None}),
        ("olmo2_1b", {"architectures": ["Olmo3ForCausalLM"], "layer_types": ["full_attention"] * 16}),
    ],
)
def test_a_configuration_without_windows_is_a_model_without(name, entries):
    config = {**HUB[name], **entries}
    _, architecture = architecture_from_config(config)
    with torch.device("meta"):
        model = architecture.build(architecture.config_from_hf(config))
    assert (model.shape.sliding_window, model.shape.rope_local_theta) == (0, 0.0)
    assert architecture.matches(model), "so that [run] init_from accepts it"


def test_a_gemma_with_an_odd_attention_scale_is_refused_at_export():
    model = decoder(replace(PRESETS["gemma3_1b"], layers=6, attention_scale=2.0))
    with pytest.raises(ValueError, match=r"attention_scale = 2.0 is not 1 / sqrt\(n\)"):
        architecture_from_model(model)[1].hf_config(model)


def test_only_the_text_model_of_gemma_3_is_supported():
    with pytest.raises(ValueError, match="of Gemma 3, only its text model"):
        architecture_from_config({"architectures": ["Gemma3ForConditionalGeneration"]})


def test_experts_of_qwen_must_be_normalized():
    config = {
        **HUB["qwen3_0.6b"], "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
    }  # fmt: skip
    with pytest.raises(ValueError, match="norm_topk_prob"):
        architecture_from_config(config)[1].config_from_hf(config)
    keys = architecture_from_config(config)[1].config_from_hf({**config, "norm_topk_prob": True})
    assert (keys["experts"], keys["top_k"], keys["ffn_dim"]) == (4, 2, 8)


POWERMOE = {
    "architectures": ["GraniteMoeForCausalLM"], "vocab_size": 49152, "hidden_size": 1536, "intermediate_size": 512,
    "num_hidden_layers": 32, "num_attention_heads": 24, "num_key_value_heads": 8, "num_local_experts": 40,
    "num_experts_per_tok": 8, "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 6.0,
    "attention_multiplier": 0.015625, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
}  # fmt: skip
"""PowerMoE-3B by the paper's table, as transformers spells it."""


def test_powermoe_is_the_size_of_that_name():
    name, architecture = architecture_from_config(POWERMOE)
    with torch.device("meta"):
        model = architecture.build(architecture.config_from_hf(POWERMOE))
    assert name == "GraniteMoeForCausalLM"
    assert replace(model.shape, head_dim=None) == PRESETS["powermoe3b"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"attention_multiplier": 0.125}, r"attention_multiplier = 0.125: only 1 / head_dim = 0.015625"),
        ({"attention_multiplier": None}, "attention_multiplier = 1"),
        ({"logits_scaling": 7.0}, "logits_scaling = 7 is not hidden_size = 1536 divided by an integer base width"),
        ({"residual_multiplier": 0}, "residual_multiplier = 0"),
        ({"num_experts_per_tok": 41}, "num_experts_per_tok = 41 exceeds num_local_experts = 40"),
        ({"num_local_experts": 10**6}, "num_local_experts = 1000000 is not an integer from 1 to 4,096"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ],
)
def test_multipliers_and_experts_of_another_kind_are_refused(entries, message):
    with pytest.raises(ValueError, match=message):
        granite_moe_keys({**POWERMOE, **entries})


def test_a_dense_granite_without_mup_is_refused_rather_than_taken_for_a_llama():
    with pytest.raises(ValueError, match="attention_multiplier"):
        granite_keys({**CONFIG, "attention_multiplier": 0.25})


def test_old_configurations_have_the_defaults_of_their_time():
    keys = llama_keys(CONFIG)
    assert (keys["kv_heads"], keys["head_dim"], keys["norm_eps"], keys["rope_theta"]) == (4, 16, 1e-6, 10_000.0)
    assert (keys["tied_embeddings"], keys["max_sequence_length"], keys["rope_scaling"]) == (False, 2048, None)


@pytest.mark.parametrize("spelling", ["rope_type", "type"])
def test_scaling_as_versions_before_5_wrote_it(spelling):
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    keys = llama_keys({**CONFIG, "rope_theta": 5e5, "rope_scaling": {spelling: "llama3", **scaling}})
    assert keys["rope_theta"] == 5e5
    assert RopeScaling(**keys["rope_scaling"]) == RopeScaling(factor=8.0)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": 10**12}, r"hidden_size = 1000000000000 is not an integer from 1 to 1,048,576"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
        ({"vocab_size": True}, "vocab_size = True"),
        ({"vocab_size": "97"}, "vocab_size = 97"),
        ({"num_attention_heads": 5}, "hidden_size = 64 cannot be divided"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3 does not divide"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rms_norm_eps": 0}, "rms_norm_eps = 0"),
        ({"rope_theta": float("nan")}, "rope_theta = nan"),
        ({"rope_scaling": {"type": "linear"}}, "rope_parameters has no factor"),
        ({"rope_scaling": {"type": "llama3", "factor": 2}}, "rope_parameters has no high_freq_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": [1]}, "not a table"),
    ],
)
def test_unsupported_features_are_refused(entries, message):
    with pytest.raises(ValueError, match=message):
        llama_keys({**CONFIG, **entries})


def test_architectures_are_told_apart_by_name_or_by_type():
    assert architecture_from_config({"architectures": ["LlamaForCausalLM"]})[1] is LLAMA
    assert architecture_from_config({"model_type": "llama"})[1] is LLAMA
    assert architecture_from_model(decoder(SMALL)) == ("LlamaForCausalLM", LLAMA)
    for config in ({"architectures": ["EvilForCausalLM"]}, {"model_type": "gpt2"}, {}, {"architectures": [{}]}):
        with pytest.raises(ValueError, match=r"architecture .* is not supported; supported are LlamaForCausalLM"):
            architecture_from_config(config)
    with pytest.raises(ValueError, match="Linear has no counterpart in transformers"):
        architecture_from_model(torch.nn.Linear(1, 1))


def test_shapes_that_do_not_fit_are_all_named():
    model = decoder(SMALL)
    shapes = part_shapes(model, LLAMA.hf_parts(model))
    assert match_tensors(model, shapes) == LLAMA.hf_parts(model)
    wrong = {**shapes, "model.norm.weight": (65,), "lm_head.weight": (64, 97)}
    with pytest.raises(ValueError, match=r"model.norm.weight is \[65\], not \[64\]; lm_head.weight is \[64, 97\]"):
        match_tensors(model, wrong)
