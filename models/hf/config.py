"""Conversion between `config.json` of transformers and the keys of `[model]`, in both directions, for each family.

A function `..._keys` returns the keys of `[model]`, without "use"; missing entries have the defaults of transformers,
except that width, layers, heads and vocabulary are required, and key-value heads are as many as heads. It raises
ValueError for an entry out of bounds, and for a function that the decoder does not support.  A function `..._entries`
returns the entries of `config.json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from models.hf.entries import read_count, read_number, read_softcap, refuse_other_values
from models.hf.rope import (
    FULL,
    SLIDING,
    max_position_to_hf,
    max_sequence_length_from_hf,
    rope_from_hf,
    rope_to_hf,
)
from models.presets import LlamaShape

Config = Mapping[str, Any]
SILU = ("silu", "swish", None)
GELU = ("gelu_pytorch_tanh", "gelu_new")


def _keys(
    config: Config,
    *,
    norm_eps: float = 1e-6,
    tied: bool = False,
    head_dim: int | None = None,
    max_position: int = 2048,
    rope: Mapping[str, float] | None = None,
    activation_entry: str = "hidden_act",
    activations: tuple[str | None, ...] = SILU,
    **variants: Any,
) -> dict[str, Any]:
    """Return the keys that all families have, and `variants`; the arguments are the defaults of a family."""
    refuse_other_values(
        config,
        {
            activation_entry: activations,
            "is_causal": (True, None),
            "attention_bias": (False, None),
            "mlp_bias": (False, None),
            "partial_rotary_factor": (1, None),
            "tie_word_embeddings": (False, True, None),
            "quantization_config": (None,),
            "use_bidirectional_attention": (False, None),
        },
    )
    heads, dim = read_count(config, "num_attention_heads"), read_count(config, "hidden_size")
    kv_heads = read_count(config, "num_key_value_heads", heads)
    if config.get("head_dim", head_dim) is None and dim % heads:
        raise ValueError(f"hidden_size = {dim} cannot be divided among num_attention_heads = {heads}")
    if heads % kv_heads:
        raise ValueError(f"num_key_value_heads = {kv_heads} does not divide num_attention_heads = {heads}")
    turned = rope_from_hf(config, **(rope or {}))
    tie = config.get("tie_word_embeddings")
    return {
        "size": "debug",
        "dim": dim,
        "layers": read_count(config, "num_hidden_layers"),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": read_count(config, "head_dim", head_dim or max(dim // heads, 1)),
        "ffn_dim": read_count(config, "intermediate_size"),
        "norm_eps": read_number(config, "rms_norm_eps", norm_eps),
        **turned,
        "tied_embeddings": tied if tie is None else tie,
        "max_sequence_length": max_sequence_length_from_hf(
            turned, read_count(config, "max_position_embeddings", max_position)
        ),
        "vocab_size": read_count(config, "vocab_size"),
        **variants,
    }


def common_entries(shape: LlamaShape, vocab_size: int, *, rope_by_layer: bool = False) -> dict[str, Any]:
    """Return the entries that all families have."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": shape.dim,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_width,
        "intermediate_size": shape.ffn_dim,
        "hidden_act": "silu",
        "rms_norm_eps": shape.norm_eps,
        **rope_to_hf(shape, by_layer=rope_by_layer),
        "max_position_embeddings": max_position_to_hf(shape),
        "tie_word_embeddings": shape.tied_embeddings,
        "attention_bias": False,
    }


# Llama 2 and 3


def llama_keys(config: Config) -> dict[str, Any]:
    return _keys(config)


def llama_entries(shape: LlamaShape, vocab_size: int) -> dict[str, Any]:
    return common_entries(shape, vocab_size) | {"mlp_bias": False}


# Granite: a Llama with the multipliers of muP


def granite_keys(config: Config) -> dict[str, Any]:
    return _with_mup(config, _keys(config))


def _with_mup(config: Config, keys: dict[str, Any]) -> dict[str, Any]:
    """The base width follows from logits_scaling. Raises ValueError if the multipliers are not those of muP."""
    attention = read_number(config, "attention_multiplier", 1.0)
    if attention != 1 / keys["head_dim"]:
        raise ValueError(
            f"attention_multiplier = {attention:g}: only 1 / head_dim = {1 / keys['head_dim']:g} (muP) is supported"
        )
    scaling = read_number(config, "logits_scaling", 1.0)
    base_width = max(round(keys["dim"] / scaling), 1)
    if keys["dim"] / base_width != scaling:
        raise ValueError(
            f"logits_scaling = {scaling:g} is not hidden_size = {keys['dim']} divided by an integer base width"
        )
    return keys | {
        "mup": {
            "base_width": base_width,
            "embedding_multiplier": read_number(config, "embedding_multiplier", 1.0),
            "residual_multiplier": read_number(config, "residual_multiplier", 1.0),
        }
    }


def granite_entries(shape: LlamaShape, vocab_size: int) -> dict[str, Any]:
    return llama_entries(shape, vocab_size) | _multipliers(shape)


def _multipliers(shape: LlamaShape) -> dict[str, Any]:
    mup = shape.mup
    return {
        "embedding_multiplier": 1.0 if mup is None else mup.embedding_multiplier,
        "residual_multiplier": shape.residual_multiplier,
        "attention_multiplier": shape.head_width**-0.5 if mup is None else 1 / shape.head_width,
        "logits_scaling": 1.0 if mup is None else mup.width_multiple(shape.dim),
    }


def granite_moe_keys(config: Config) -> dict[str, Any]:
    """Without muP if all multipliers are those of a Llama."""
    keys = _keys(config) | _experts(config, "num_local_experts", experts=8, top_k=2)
    others = [
        read_number(config, name, 1.0) for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling")
    ]
    if read_number(config, "attention_multiplier", 1.0) == keys["head_dim"] ** -0.5 and others == [1.0, 1.0, 1.0]:
        return keys
    return _with_mup(config, keys)


def granite_moe_entries(shape: LlamaShape, vocab_size: int) -> dict[str, Any]:
    experts = {"num_local_experts": shape.experts, "num_experts_per_tok": shape.top_k}
    return common_entries(shape, vocab_size) | _multipliers(shape) | experts


def _experts(config: Config, name: str, *, experts: int, top_k: int) -> dict[str, int]:
    keys = {"experts": read_count(config, name, experts), "top_k": read_count(config, "num_experts_per_tok", top_k)}
    if keys["top_k"] > keys["experts"]:
        raise ValueError(f"num_experts_per_tok = {keys['top_k']} exceeds {name} = {keys['experts']}")
    return keys


# Mistral: a window in every layer


def mistral_keys(config: Config) -> dict[str, Any]:
    refuse_other_values(config, {"layer_types": (None,)})
    return _keys(config, max_position=131_072, sliding_window=_read_window(config))


def mistral_entries(shape: LlamaShape, vocab_size: int) -> dict[str, Any]:
    return common_entries(shape, vocab_size) | {"sliding_window": shape.sliding_window or None}


# Qwen 2 and 3


def qwen2_keys(config: Config) -> dict[str, Any]:
    return _keys(config, max_position=32_768, qkv_bias=True, **_qwen_windows(config))


def qwen2_entries(shape: LlamaShape, vocab_size: int) -> dict[str, Any]:
    return common_entries(shape, vocab_size) | _qwen_window_entries(shape)


def qwen3_keys(config: Config) -> dict[str, Any]:
    return _keys(config, max_position=32_768, head_dim=128, qk_norm="per_head", **_qwen_windows(config))


def qwen3_moe_keys(config: Config) -> dict[str, Any]:
    refuse_other_values(
        config,
        {
            "norm_topk_prob": (True,),
            "decoder_sparse_step": (1, None),
            "mlp_only_layers": (None,),
            "layer_types": (None,),
        },
    )
    window = _read_window(config) if config.get("use_sliding_window") else 0
    keys = _keys(config, max_position=32_768, qk_norm="per_head", sliding_window=window)
    keys["ffn_dim"] = read_count(config, "moe_intermediate_size", 768)
    # transformers 5 writes the second name, and reads both
    name = "num_experts" if "num_experts" in config else "num_local_experts"
    return keys | _experts(config, name, experts=128, top_k=8)


def qwen3_moe_entries(shape: LlamaShape, vocab_size: int) -> dict[str, Any]:
    return common_entries(shape, vocab_size) | {
        "moe_intermediate_size": shape.ffn_dim,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": bool(shape.sliding_window),
        "sliding_window": shape.sliding_window or None,
    }


def _qwen_windows(config: Config) -> dict[str, Any]:
    layers = read_count(config, "num_hidden_layers")
    if not config.get("use_sliding_window") or not _read_window(config):
        return {"sliding_window": 0, "global_attention_interval": 0}
    first = config.get("max_window_layers", 28)
    if not isinstance(first, int):
        raise ValueError(f"max_window_layers = {str(first)[:40]} is not an integer")
    types = config.get("layer_types") or [SLIDING if i >= first else FULL for i in range(layers)]
    return _windows(config, types)


def _qwen_window_entries(shape: LlamaShape) -> dict[str, Any]:
    window = bool(shape.sliding_window)
    return _window_entries(shape) | {"use_sliding_window": window, "max_window_layers": 0 if window else shape.layers}


def _read_window(config: Config) -> int:
    """Return the window; 0 for null, which is none."""
    return 0 if config.get("sliding_window", 0) is None else _window_size(config)


def _window_size(config: Config) -> int:
    """Return the window, with the default that all families with windows have."""
    return read_count(config, "sliding_window", 4096)


def _windows(config: Config, layer_types: object) -> dict[str, Any]:
    """Return the keys of windows for these `layer_types`. Raises ValueError if they are not periodic."""
    layers = read_count(config, "num_hidden_layers")
    known = isinstance(layer_types, Sequence) and all(kind in (FULL, SLIDING) for kind in layer_types)
    if not known or len(layer_types) != layers:  # type: ignore[arg-type]
        raise ValueError(f"layer_types is not a list of {layers} times {FULL!r} or {SLIDING!r}")
    is_global = [kind == FULL for kind in layer_types]  # type: ignore[attr-defined]
    if all(is_global):
        return {"sliding_window": 0, "global_attention_interval": 0}
    interval = is_global.index(True) + 1 if any(is_global) else 0
    if is_global != [interval > 0 and (layer + 1) % interval == 0 for layer in range(layers)]:
        raise ValueError(f"layer_types: only every n-th layer can be {FULL!r}, beginning with the n-th")
    return {"sliding_window": _window_size(config), "global_attention_interval": interval}


def _window_entries(shape: LlamaShape) -> dict[str, Any]:
    types = [SLIDING if shape.window_of(layer) else FULL for layer in range(shape.layers)]
    return {"layer_types": types, "sliding_window": shape.sliding_window or None}


def _every(config: Config, interval: int) -> list[str]:
    layers = read_count(config, "num_hidden_layers")
    return [SLIDING if (layer + 1) % interval else FULL for layer in range(layers)]


# OLMo 2 and 3


def olmo2_keys(config: Config) -> dict[str, Any]:
    return _keys(config, norm_eps=1e-5, norm_placement="post", qk_norm="all_heads")


def olmo3_keys(config: Config) -> dict[str, Any]:
    rope = {"theta": 500_000.0, "local_theta": read_number(config, "rope_theta", 500_000.0)}
    windows = _windows(config, config.get("layer_types") or _every(config, 4))
    keys = _keys(config, norm_eps=1e-5, norm_placement="post", qk_norm="all_heads", rope=rope, **windows)
    return keys if keys["sliding_window"] else keys | {"rope_local_theta": 0.0}


def olmo3_entries(shape: LlamaShape, vocab_size: int) -> dict[str, Any]:
    entries = common_entries(shape, vocab_size, rope_by_layer=True) | _window_entries(shape)
    return entries | {"sliding_window": shape.sliding_window or shape.max_sequence_length}


# Gemma 2 and 3


def gemma2_keys(config: Config) -> dict[str, Any]:
    return _gemma_keys(
        config,
        max_position=8192,
        attention_softcap=read_softcap(config, "attn_logit_softcapping", 50.0),
        logit_softcap=read_softcap(config, "final_logit_softcapping", 30.0),
        **_windows(config, config.get("layer_types") or _every(config, 2)),
    )


def gemma2_entries(shape: LlamaShape, vocab_size: int) -> dict[str, Any]:
    return _gemma_entries(shape, vocab_size) | {"attn_logit_softcapping": shape.attention_softcap or None}


def gemma3_keys(config: Config) -> dict[str, Any]:
    # transformers reads this entry, but its Gemma 3 does not use it
    refuse_other_values(config, {"attn_logit_softcapping": (None,)})
    pattern = read_count(config, "sliding_window_pattern", 6)
    return _gemma_keys(
        config,
        max_position=131_072,
        qk_norm="per_head",
        logit_softcap=read_softcap(config, "final_logit_softcapping"),
        rope={"theta": 1_000_000.0, "local_theta": 10_000.0},
        **_windows(config, config.get("layer_types") or _every(config, pattern)),
    )


def gemma3_entries(shape: LlamaShape, vocab_size: int) -> dict[str, Any]:
    # readers before transformers 5 derive the kind of a layer from the pattern
    pattern = {"sliding_window_pattern": shape.global_attention_interval or shape.layers + 1}
    return _gemma_entries(shape, vocab_size, rope_by_layer=True) | pattern


def _gemma_keys(config: Config, **variants: Any) -> dict[str, Any]:
    keys = _keys(
        config,
        tied=True,
        head_dim=256,
        activation_entry="hidden_activation" if config.get("hidden_activation") else "hidden_act",
        activations=(*GELU, None),
        activation="gelu_tanh",
        norm_placement="both",
        zero_centered_norm=True,
        scaled_embeddings=True,
        **variants,
    )
    if not keys["sliding_window"]:
        keys["rope_local_theta"] = 0.0
    scalar = read_count(config, "query_pre_attn_scalar", 256)
    return keys | {"attention_scale": 0.0 if scalar == keys["head_dim"] else scalar**-0.5}


def _gemma_entries(shape: LlamaShape, vocab_size: int, *, rope_by_layer: bool = False) -> dict[str, Any]:
    scalar = max(round(shape.attention_scale**-2), 1) if shape.attention_scale else shape.head_width
    if shape.attention_scale and abs(scalar**-0.5 / shape.attention_scale - 1) > 1e-9:
        raise ValueError(f"attention_scale = {shape.attention_scale} is not 1 / sqrt(n) of an integer n, as in Gemma")
    entries = common_entries(shape, vocab_size, rope_by_layer=rope_by_layer)
    del entries["hidden_act"]
    return {
        **entries,
        **_window_entries(shape),
        "sliding_window": shape.sliding_window or shape.max_sequence_length,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "final_logit_softcapping": shape.logit_softcap or None,
        "attn_logit_softcapping": None,
    }
