"""Weights by name, between the decoder and `transformers`, in both directions: Llama, Granite and GraniteMoe.

Only names differ: both keep the half-rotation layout of RoPE (models/rope.py) and (out, in) matrices, those of experts
one behind the other and gate before up. So no weight is permuted or transposed, and a round trip is bitwise.
"""

from __future__ import annotations

from collections.abc import Iterable

from models.presets import LlamaShape

RECOMPUTED_BUFFERS = "rotary_emb.inv_freq"
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


def hf_names(shape: LlamaShape) -> dict[str, str]:
    """Our name -> the Hugging Face name, of every parameter of a decoder of this shape."""
    table = {ours: theirs for ours, theirs in _TOP.items() if not (shape.tied_embeddings and ours == "output.weight")}
    for i in range(shape.layers):
        for ours, theirs in {**_IN_LAYER, **(_EXPERTS if shape.experts else _DENSE)}.items():
            table[f"layers.{i}.{ours}.weight"] = f"model.layers.{i}.{theirs}.weight"
    return table


def stored_names(stored: Iterable[str], shape: LlamaShape) -> dict[str, str]:
    """Our name -> the name a Hugging Face checkpoint of the tensors `stored` has it under.

    Leaves out what other writers add: `rotary_emb.inv_freq`, which is computed here, and the second copy of a tied
    head. Where a tied head was stored in place of the embedding, it is the embedding. Raises ValueError unless every
    parameter is there and nothing else is.
    """
    found = {name: name for name in stored if not name.endswith(RECOMPUTED_BUFFERS)}
    if shape.tied_embeddings and HEAD in found:
        tied = found.pop(HEAD)
        found.setdefault(EMBEDDING, tied)
    table = hf_names(shape)
    missing, unknown = sorted(set(table.values()) - found.keys()), sorted(found.keys() - set(table.values()))
    if missing or unknown:
        raise ValueError(
            f"weights do not fit a model of {len(table)} parameters: "
            f"{len(missing)} missing {missing[:3]}, {len(unknown)} unknown {unknown[:3]}"
        )
    return {ours: found[theirs] for ours, theirs in table.items()}
