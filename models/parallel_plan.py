"""The parallel plan of a Llama: tensor-parallel styles and FSDP groups, by module name.

A new style is a class, and an entry of STYLES, in components/distributed/tensor_parallel.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from models.presets import LlamaShape

_ATTENTION = {
    "layers.*.attention": "gather_sequence",
    "layers.*.attention.wq": "columns",
    "layers.*.attention.wk": "columns",
    "layers.*.attention.wv": "columns",
    "layers.*.attention.wg": "columns",
    "layers.*.attention.wo": "rows",
}
_DENSE = {
    "layers.*.feed_forward": "gather_sequence",
    "layers.*.feed_forward.w_gate": "columns",
    "layers.*.feed_forward.w_up": "columns",
    "layers.*.feed_forward.w_down": "rows",
}
_EXPERTS = {"layers.*.feed_forward": "replicated", "router_loss": "sequence_all_reduce"}
"""Every TP rank holds all experts, and routes the tokens of its shard of the sequence to them."""
_OUTSIDE = {"tok_embeddings": "embedding", "norm": "sequence", "output": "vocabulary"}


def tensor_parallel_styles(shape: LlamaShape) -> dict[str, str]:
    """Return module name -> style of components/distributed/tensor_parallel.py.

    "columns" shards the output features of a matrix, "rows" its input features: a pair of them needs one reduction.
    """
    styles = _OUTSIDE | _ATTENTION | (_EXPERTS if shape.experts else _DENSE)
    if not shape.gated_attention:
        del styles["layers.*.attention.wg"]
    if shape.norm_placement != "post":
        styles |= dict.fromkeys(("layers.*.attention_norm", "layers.*.ffn_norm"), "sequence")
    if shape.norm_placement != "pre":  # their outputs are added to the residual stream, a plain tensor
        styles |= dict.fromkeys(("layers.*.attention_post_norm", "layers.*.ffn_post_norm"), "sequence_to_local")
    if shape.qk_norm != "off":
        style = "channels" if shape.qk_norm == "all_heads" else "heads"
        styles |= dict.fromkeys(("layers.*.attention.q_norm", "layers.*.attention.k_norm"), style)
    return styles


@dataclass(frozen=True)
class ParallelPlan:
    """How one model is parallelized."""

    tensor_parallel: dict[str, str]
    """Module name -> tensor-parallel style."""
    fsdp_groups: list[list[str]]
    """Names of the modules whose weights FSDP2 gathers together, in the order of use."""


def llama_parallel_plan(shape: LlamaShape) -> ParallelPlan:
    """Return the plan of a Llama: an FSDP group for the embedding, one for each block, one for norm and head.

    A tied matrix is used first and last, so it is in no group and stays gathered for the whole pass.
    """
    blocks = [[f"layers.{i}"] for i in range(shape.layers)]
    fsdp_groups = blocks if shape.tied_embeddings else [["tok_embeddings"], *blocks, ["norm", "output"]]
    return ParallelPlan(tensor_parallel_styles(shape), fsdp_groups)
