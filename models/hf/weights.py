"""Parameter names of the decoder in `transformers`, for every supported family.

`hf_parts` chooses the names by the shape of the decoder; an architecture is a row of architectures.py.

Only names differ. Both use the half-rotation layout of RoPE (models/rope.py) and (out, in) matrices. Granite stacks
experts as the decoder does, with gate before up; Qwen 3 stores a tensor for each, which is a part of ours. So no weight
is permuted or transposed, and a round trip is bitwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import Tensor

from models.presets import LlamaShape

RECOMPUTED_BUFFERS = "rotary_emb.inv_freq"
"""Suffix of buffers that old checkpoints store, and that are recomputed here."""
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_TOP = {
    "tok_embeddings.weight": EMBEDDING,
    "norm.weight": "model.norm.weight",
    "output.weight": HEAD,
}
_ATTENTION = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
}
_QK_NORMS = {"attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm"}
_NORMS = {
    "pre": {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
    "post": {
        "attention_post_norm": "post_attention_layernorm",
        "ffn_post_norm": "post_feedforward_layernorm",
    },
    "both": {
        "attention_norm": "input_layernorm",
        "attention_post_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "ffn_post_norm": "post_feedforward_layernorm",
    },
}
_DENSE = {
    "feed_forward.w_gate": "mlp.gate_proj",
    "feed_forward.w_up": "mlp.up_proj",
    "feed_forward.w_down": "mlp.down_proj",
}
_GRANITE_EXPERTS = {
    "feed_forward.router": "block_sparse_moe.router.layer",
    "feed_forward.w_gate_up": "block_sparse_moe.input_linear",
    "feed_forward.w_down": "block_sparse_moe.output_linear",
}


class Part(NamedTuple):
    """A parameter, or a part of it."""

    name: str
    bounds: tuple[tuple[int, int], ...] = ()
    """First index, and the one after the last, of each of the first dimensions; in the first one, of one expert. Empty:
    all of it."""

    def of(self, parameter: Tensor) -> Tensor:
        """Return the part of `parameter`, a view, in the shape that is stored: without a dimension of experts."""
        return parameter[tuple(slice(*each) for each in self.bounds)].squeeze(0) if self.bounds else parameter


def hf_parts(shape: LlamaShape) -> dict[str, Part]:
    """Return Hugging Face name -> the parameter, or its part, for every tensor of a decoder of this shape."""
    parts = {
        theirs: Part(ours) for ours, theirs in _TOP.items() if not (shape.tied_embeddings and ours == "output.weight")
    }
    names = _ATTENTION | _NORMS[shape.norm_placement]
    if shape.qk_norm != "off":
        names |= _QK_NORMS
    stacked = not has_separate_experts(shape)
    names |= _DENSE if not shape.experts else _GRANITE_EXPERTS if stacked else {"feed_forward.router": "mlp.gate"}
    for i in range(shape.layers):
        for ours, theirs in names.items():
            parts[f"model.layers.{i}.{theirs}.weight"] = Part(f"layers.{i}.{ours}.weight")
            if shape.qkv_bias and ours.endswith(("wq", "wk", "wv")):
                parts[f"model.layers.{i}.{theirs}.bias"] = Part(f"layers.{i}.{ours}.bias")
        if not stacked:
            parts |= dict(_separate_experts(shape, i))
    return parts


def has_separate_experts(shape: LlamaShape) -> bool:
    """Return whether the family stores a tensor for each expert: Qwen 3, which has norms of queries and keys."""
    return bool(shape.experts) and shape.qk_norm != "off"


def _separate_experts(shape: LlamaShape, layer: int) -> Iterator[tuple[str, Part]]:
    ours, width = f"layers.{layer}.feed_forward", shape.ffn_dim
    for expert in range(shape.experts):
        theirs, one = f"model.layers.{layer}.mlp.experts.{expert}", (expert, expert + 1)
        yield f"{theirs}.gate_proj.weight", Part(f"{ours}.w_gate_up.weight", (one, (0, width)))
        yield f"{theirs}.up_proj.weight", Part(f"{ours}.w_gate_up.weight", (one, (width, 2 * width)))
        yield f"{theirs}.down_proj.weight", Part(f"{ours}.w_down.weight", (one,))


def stored_parts(stored: Iterable[str], shape: LlamaShape) -> dict[str, Part]:
    """Return stored name -> part, for a Hugging Face checkpoint with the tensors `stored`.

    Ignores what other writers add: `rotary_emb.inv_freq` and a copy of a tied head. A tied head that is stored without
    the embedding is used as the embedding. Raises ValueError if a parameter is missing, or a tensor is unknown.
    """
    found = {name: name for name in stored if not name.endswith(RECOMPUTED_BUFFERS)}
    if shape.tied_embeddings and HEAD in found:
        tied = found.pop(HEAD)
        found.setdefault(EMBEDDING, tied)
    parts = hf_parts(shape)
    missing, unknown = sorted(parts.keys() - found.keys()), sorted(found.keys() - parts.keys())
    if missing or unknown:
        raise ValueError(
            f"the weights do not match a model of {len(parts)} tensors: "
            f"{len(missing)} missing {missing[:3]}, {len(unknown)} unknown {unknown[:3]}"
        )
    return {found[theirs]: part for theirs, part in parts.items()}
