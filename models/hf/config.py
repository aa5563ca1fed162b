"""Conversion between `config.json` of transformers and the keys of `[model]`, in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.presets import LlamaShape

_LIMITS = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "head_dim": 2**16,
    "max_position_embeddings": 2**31,
    "num_local_experts": 2**12,
    "num_experts_per_tok": 2**12,
}
"""Largest accepted value of each entry, which bounds what a damaged or malicious file can make us allocate."""

_ROPE = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}


def llama_config_from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of `[model]`, without "use", for the config of a `LlamaForCausalLM`.

    Missing entries have the defaults of `LlamaConfig`, except for the shape, which is required. Raises ValueError for
    an entry out of bounds, and for a function that the decoder does not support.
    """
    _refuse_what_differs(config)
    heads = _count(config, "num_attention_heads")
    dim = _count(config, "hidden_size")
    theta, scaling = _rope(config)
    keys: dict[str, Any] = {
        "size": "debug",
        "dim": dim,
        "layers": _count(config, "num_hidden_layers"),
        "heads": heads,
        "kv_heads": _count(config, "num_key_value_heads", heads),
        "head_dim": _count(config, "head_dim", max(dim // heads, 1)),
        "ffn_dim": _count(config, "intermediate_size"),
        "norm_eps": _number(config, "rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tied_embeddings": config.get("tie_word_embeddings") or False,
        "max_sequence_length": _count(config, "max_position_embeddings", 2048),
        "vocab_size": _count(config, "vocab_size"),
    }
    if "head_dim" not in config and dim % heads:
        raise ValueError(f"hidden_size = {dim} cannot be divided among num_attention_heads = {heads}")
    if heads % keys["kv_heads"]:
        raise ValueError(f"num_key_value_heads = {keys['kv_heads']} does not divide num_attention_heads = {heads}")
    return keys


def granite_config_from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of `[model]` for a `GraniteForCausalLM`: a Llama with the multipliers of muP.

    The base width follows from logits_scaling. Raises ValueError if the multipliers are not those of muP.
    """
    keys = llama_config_from_hf(config)
    attention = _number(config, "attention_multiplier", 1.0)
    if attention != 1 / keys["head_dim"]:
        raise ValueError(
            f"attention_multiplier = {attention:g}: only 1 / head_dim = {1 / keys['head_dim']:g} (muP) is supported"
        )
    scaling = _number(config, "logits_scaling", 1.0)
    base_width = max(round(keys["dim"] / scaling), 1)
    if keys["dim"] / base_width != scaling:
        raise ValueError(
            f"logits_scaling = {scaling:g} is not hidden_size = {keys['dim']} divided by an integer base width"
        )
    return keys | {
        "mup": {
            "base_width": base_width,
            "embedding_multiplier": _number(config, "embedding_multiplier", 1.0),
            "residual_multiplier": _number(config, "residual_multiplier", 1.0),
        }
    }


def granite_moe_config_from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of `[model]` for a `GraniteMoeForCausalLM`; without muP if all multipliers are those of a
    Llama."""
    plain = llama_config_from_hf(config)
    experts = {
        "experts": _count(config, "num_local_experts", 8),
        "top_k": _count(config, "num_experts_per_tok", 2),
    }
    if experts["top_k"] > experts["experts"]:
        raise ValueError(f"num_experts_per_tok = {experts['top_k']} exceeds num_local_experts = {experts['experts']}")
    others = [_number(config, name, 1.0) for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling")]
    if _number(config, "attention_multiplier", 1.0) == plain["head_dim"] ** -0.5 and others == [1.0, 1.0, 1.0]:
        return plain | experts
    return granite_config_from_hf(config) | experts


def _refuse_what_differs(config: Mapping[str, Any]) -> None:
    expected: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("silu", "swish", None),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "partial_rotary_factor": (1, None),
        "tie_word_embeddings": (False, True, None),
        "quantization_config": (None,),
    }
    for name, values in expected.items():
        if config.get(name) not in values:
            raise ValueError(f"{name} = {config[name]!r} is not supported; the decoder has {values[0]!r}")


def _rope(config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Return rope_theta and the keys of `models.rope:RopeScaling`, from `rope_parameters` or its older spelling."""
    table = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(table, Mapping):
        raise ValueError(f"rope_parameters: {table!r} is not a table")
    theta = _number({**config, **table}, "rope_theta", 10_000.0)
    kind = table.get("rope_type", table.get("type", "default"))
    if table.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"partial_rotary_factor = {table['partial_rotary_factor']}: the decoder rotates all channels")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f'rope_type = {kind!r} is not supported; the decoder has "default" and "llama3"')
    if missing := sorted(_ROPE - table.keys()):
        raise ValueError(f"rope_parameters has no {', '.join(missing)}")
    return theta, {
        "factor": _number(table, "factor"),
        "low_freq_factor": _number(table, "low_freq_factor"),
        "high_freq_factor": _number(table, "high_freq_factor"),
        "original_max_position": _count(
            {"max_position_embeddings": table["original_max_position_embeddings"]}, "max_position_embeddings"
        ),
    }


def _count(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"{name} is missing from config.json")
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LIMITS[name]:
        raise ValueError(f"{name} = {str(value)[:40]} is not an integer from 1 to {_LIMITS[name]:,}")
    return value


def _number(config: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e30:
        raise ValueError(f"{name} = {str(value)[:40]} is not a number above 0")
    return float(value)


def hf_config(shape: LlamaShape, vocab_size: int) -> dict[str, Any]:
    """Return the entries of `config.json` (transformers 5) for a decoder of this shape.

    They are those of `LlamaConfig`, with muP `GraniteConfig`, and with experts `GraniteMoeConfig`.
    """
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": shape.rope_theta}
    if shape.rope_scaling is not None:
        scaling = shape.rope_scaling
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
    entries = {
        "vocab_size": vocab_size,
        "hidden_size": shape.dim,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_width,
        "intermediate_size": shape.ffn_dim,
        "hidden_act": "silu",
        "rms_norm_eps": shape.norm_eps,
        "rope_parameters": rope,
        "max_position_embeddings": shape.max_sequence_length,
        "tie_word_embeddings": shape.tied_embeddings,
        "attention_bias": False,
    }
    if shape.mup is not None or shape.experts:
        mup = shape.mup
        entries |= {
            "embedding_multiplier": 1.0 if mup is None else mup.embedding_multiplier,
            "residual_multiplier": 1.0 if mup is None else mup.residual_multiplier,
            "attention_multiplier": shape.head_width**-0.5 if mup is None else 1 / shape.head_width,
            "logits_scaling": 1.0 if mup is None else mup.width_multiple(shape.dim),
        }
    if shape.experts:
        return entries | {"num_local_experts": shape.experts, "num_experts_per_tok": shape.top_k}
    return entries | {"mlp_bias": False}
