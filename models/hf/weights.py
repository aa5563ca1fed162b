"""Weights by name, between the decoder and `transformers`, in both directions: Llama, Granite and GraniteMoe.

Only names differ: both keep the half-rotation layout of RoPE (models/rope.py) and (out, in) matrices, those of experts
one behind the other and gate before up. So no weight is permuted or transposed, and a round trip is bitwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from models.presets import Size

T = TypeVar("T")

COMPUTED = "rotary_emb.inv_freq"
"""The end of names under which old checkpoints store what is computed anew."""
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_TOP = {
    "tok_embeddings.weight": EMBEDDING,
    "norm.weight": "model.norm.weight",
    "output.weight": HEAD,
}
_IN_LAYER = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
}
_DENSE = {
    "feed_forward.w_gate": "mlp.gate_proj",
    "feed_forward.w_up": "mlp.up_proj",
    "feed_forward.w_down": "mlp.down_proj",
}
_EXPERTS = {
    "feed_forward.router": "block_sparse_moe.router.layer",
    "feed_forward.w_gate_up": "block_sparse_moe.input_linear",
    "feed_forward.w_down": "block_sparse_moe.output_linear",
}


def names(size: Size) -> dict[str, str]:
    """Our name -> the Hugging Face name, of every parameter of a decoder of this size."""
    table = {ours: theirs for ours, theirs in _TOP.items() if not (size.tied_embeddings and ours == "output.weight")}
    for i in range(size.layers):
        for ours, theirs in {**_IN_LAYER, **(_EXPERTS if size.experts else _DENSE)}.items():
            table[f"layers.{i}.{ours}.weight"] = f"model.layers.{i}.{theirs}.weight"
    return table


def to_hf(weights: Mapping[str, Tensor], size: Size) -> dict[str, Tensor]:
    """The same tensors under Hugging Face names. A tied head is stored once, as the embedding."""
    return _rename(weights, names(size))


def stored_names(stored: Iterable[str], size: Size) -> dict[str, str]:
    """Our name -> the name a Hugging Face checkpoint of the tensors `stored` has it under.

    Leaves out what other writers add: `rotary_emb.inv_freq`, which is computed here, and the second copy of a tied
    head. Where a tied head was stored in place of the embedding, it is the embedding. Raises ValueError unless every
    parameter is there and nothing else is.
    """
    found = {name: name for name in stored if not name.endswith(COMPUTED)}
    if size.tied_embeddings and HEAD in found:
        tied = found.pop(HEAD)
        found.setdefault(EMBEDDING, tied)
    return _rename(found, {theirs: ours for ours, theirs in names(size).items()})


def from_hf(weights: Mapping[str, Tensor], size: Size) -> dict[str, Tensor]:
    """The same tensors under our names, as `stored_names` finds them."""
    return {ours: weights[theirs] for ours, theirs in stored_names(weights, size).items()}


def hf_config(size: Size, vocab_size: int) -> dict[str, Any]:
    """The entries (transformers 5) that describe the same function.

    Those of `LlamaConfig`; with muP of `GraniteConfig`, which has its multipliers; with experts of `GraniteMoeConfig`.
    """
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": size.rope_theta}
    if size.rope_scaling is not None:
        scaling = size.rope_scaling
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
    entries = {
        "vocab_size": vocab_size,
        "hidden_size": size.dim,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_width,
        "intermediate_size": size.ffn_dim,
        "hidden_act": "silu",
        "rms_norm_eps": size.norm_eps,
        "rope_parameters": rope,
        "max_position_embeddings": size.max_sequence_length,
        "tie_word_embeddings": size.tied_embeddings,
        "attention_bias": False,
    }
    if size.mup is not None or size.experts:
        mup = size.mup
        entries |= {
            "embedding_multiplier": 1.0 if mup is None else mup.embedding_multiplier,
            "residual_multiplier": 1.0 if mup is None else mup.residual_multiplier,
            "attention_multiplier": size.head_width**-0.5 if mup is None else 1 / size.head_width,
            "logits_scaling": 1.0 if mup is None else mup.width_multiple(size.dim),
        }
    if size.experts:
        return entries | {"num_local_experts": size.experts, "num_experts_per_tok": size.top_k}
    return entries | {"mlp_bias": False}


def _rename(weights: Mapping[str, T], table: Mapping[str, str]) -> dict[str, T]:
    """Raises ValueError unless `weights` has exactly the names of `table`."""
    missing, unknown = sorted(table.keys() - weights.keys()), sorted(weights.keys() - table.keys())
    if missing or unknown:
        raise ValueError(
            f"weights do not fit a model of {len(table)} parameters: "
            f"{len(missing)} missing {missing[:3]}, {len(unknown)} unknown {unknown[:3]}"
        )
    return {table[name]: weight for name, weight in weights.items()}
