"""Parameter names of the decoder in `transformers`: Llama, Granite and GraniteMoe.

`hf_names` chooses the names by the shape of the decoder; an architecture is a row of architectures.py.

Only names differ. Both use the half-rotation layout of RoPE (models/rope.py) and (out, in) matrices, with stacked
experts and gate before up. So no weight is permuted or transposed, and a round trip is bitwise.
"""

from __future__ import annotations

from collections.abc import Iterable

from models.presets import LlamaShape

RECOMPUTED_BUFFERS = "rotary_emb.inv_freq"
"""Suffix of buffers that old checkpoints store, and that are recomputed here."""
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
    """Return our name -> Hugging Face name, for every parameter of a decoder of this shape."""
    table = {ours: theirs for ours, theirs in _TOP.items() if not (shape.tied_embeddings and ours == "output.weight")}
    for i in range(shape.layers):
        for ours, theirs in {**_IN_LAYER, **(_EXPERTS if shape.experts else _DENSE)}.items():
            table[f"layers.{i}.{ours}.weight"] = f"model.layers.{i}.{theirs}.weight"
    return table


def stored_names(stored: Iterable[str], shape: LlamaShape) -> dict[str, str]:
    """Return our name -> stored name, for a Hugging Face checkpoint with the tensors `stored`.

    Ignores what other writers add: `rotary_emb.inv_freq` and a copy of a tied head. A tied head that is stored without
    the embedding is used as the embedding. Raises ValueError if a parameter is missing, or a tensor is unknown.
    """
    found = {name: name for name in stored if not name.endswith(RECOMPUTED_BUFFERS)}
    if shape.tied_embeddings and HEAD in found:
        tied = found.pop(HEAD)
        found.setdefault(EMBEDDING, tied)
    table = hf_names(shape)
    missing, unknown = sorted(set(table.values()) - found.keys()), sorted(found.keys() - set(table.values()))
    if missing or unknown:
        raise ValueError(
            f"the weights do not match a model of {len(table)} parameters: "
            f"{len(missing)} missing {missing[:3]}, {len(unknown)} unknown {unknown[:3]}"
        )
    return {ours: found[theirs] for ours, theirs in table.items()}
