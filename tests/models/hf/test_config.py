"""A `config.json` and `[model]` say the same, or the difference is refused."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from models.decoder import Decoder
from models.hf.architectures import ARCHITECTURES, architecture_from_config, architecture_from_model, match_tensors
from models.hf.config import granite_config_from_hf, granite_moe_config_from_hf, llama_config_from_hf
from models.mup import MuP
from models.presets import PRESETS, LlamaShape
from models.rope import RopeScaling

pytestmark = pytest.mark.quick

LLAMA = ARCHITECTURES["LlamaForCausalLM"]
SMALL = LlamaShape(dim=64, layers=2, heads=4, kv_heads=2, ffn_dim=96)
SIZES_AND_MORE = {
    **PRESETS,
    "own head": replace(SMALL, head_dim=40),
    "tied, scaled": replace(SMALL, tied_embeddings=True, rope_scaling=RopeScaling(factor=4.0)),
    "narrower than the base, own head": replace(SMALL, head_dim=40, mup=MuP(base_width=200)),
    "experts without muP": replace(SMALL, experts=6, top_k=2, head_dim=40),
    "all multipliers of one, and experts": replace(SMALL, experts=6, top_k=2, mup=MuP(base_width=64)),
}
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


@pytest.mark.parametrize("size", SIZES_AND_MORE.values(), ids=SIZES_AND_MORE)
def test_a_written_config_reads_back_as_the_same_model(size):
    size = replace(size, layers=2)
    name, architecture = architecture_from_model(decoder(size))
    expected = "GraniteMoeForCausalLM" if size.experts else "LlamaForCausalLM" if size.mup is None else None
    assert name == (expected or "GraniteForCausalLM")
    with torch.device("meta"):
        back = architecture.build(architecture.config_from_hf(architecture.hf_config(decoder(size))))
    assert replace(back.shape, head_dim=size.head_dim) == size
    assert back.shape.head_width == size.head_width
    assert back.vocab_size == 97


def test_every_number_of_a_size_is_written():
    """A number that Size gains must be written and read, or be refused where transformers has no word for it."""
    assert {field.name for field in fields(LlamaShape)} == {
        "dim", "layers", "heads", "kv_heads", "ffn_dim", "head_dim", "norm_eps", "rope_theta", "rope_scaling",
        "tied_embeddings", "max_sequence_length", "mup", "experts", "top_k",
    }  # fmt: skip


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
        granite_moe_config_from_hf({**POWERMOE, **entries})


def test_a_dense_granite_without_mup_is_refused_rather_than_taken_for_a_llama():
    with pytest.raises(ValueError, match="attention_multiplier"):
        granite_config_from_hf({**CONFIG, "attention_multiplier": 0.25})


def test_old_configurations_have_the_defaults_of_their_time():
    keys = llama_config_from_hf(CONFIG)
    assert (keys["kv_heads"], keys["head_dim"], keys["norm_eps"], keys["rope_theta"]) == (4, 16, 1e-6, 10_000.0)
    assert (keys["tied_embeddings"], keys["max_sequence_length"], keys["rope_scaling"]) == (False, 2048, None)


@pytest.mark.parametrize("spelling", ["rope_type", "type"])
def test_scaling_as_versions_before_5_wrote_it(spelling):
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    keys = llama_config_from_hf({**CONFIG, "rope_theta": 5e5, "rope_scaling": {spelling: "llama3", **scaling}})
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
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_type = 'linear'"),
        ({"rope_scaling": {"type": "llama3", "factor": 2}}, "rope_parameters has no high_freq_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": [1]}, "not a table"),
    ],
)
def test_unsupported_features_are_refused(entries, message):
    with pytest.raises(ValueError, match=message):
        llama_config_from_hf({**CONFIG, **entries})


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
    shapes = {LLAMA.hf_names(model)[name]: tuple(p.shape) for name, p in model.named_parameters()}
    assert match_tensors(model, shapes) == LLAMA.hf_names(model)
    wrong = {**shapes, "model.norm.weight": (65,), "lm_head.weight": (64, 97)}
    with pytest.raises(ValueError, match=r"model.norm.weight is \[65\], not \[64\]; lm_head.weight is \[64, 97\]"):
        match_tensors(model, wrong)
