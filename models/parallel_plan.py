"""The parallel plan of a Llama: tensor-parallel styles and FSDP groups, by module name.

A new style is a class, and an entry of STYLES, in components/distributed/tensor_parallel.py.
"""

from __future__ import annotations

from dataclasses import dataclass

TENSOR_PARALLEL = {
    "tok_embeddings": "embedding",
    "layers.*.attention_norm": "sequence",
    "layers.*.attention": "gather_sequence",
    "layers.*.attention.wq": "columns",
    "layers.*.attention.wk": "columns",
    "layers.*.attention.wv": "columns",
    "layers.*.attention.wo": "rows",
    "layers.*.ffn_norm": "sequence",
    "layers.*.feed_forward": "gather_sequence",
    "layers.*.feed_forward.w_gate": "columns",
    "layers.*.feed_forward.w_up": "columns",
    "layers.*.feed_forward.w_down": "rows",
    "norm": "sequence",
    "output": "vocabulary",
}
"""Module name -> style of components/distributed/tensor_parallel.py. "columns" shards the output features of a matrix
and "rows" its input features, so a pair of them needs one reduction."""
_DENSE = "layers.*.feed_forward"
EXPERTS = {name: style for name, style in TENSOR_PARALLEL.items() if not name.startswith(_DENSE)} | {
    "layers.*.feed_forward": "replicated",
    "router_loss": "sequence_all_reduce",
}
"""With experts: every TP rank holds all experts, and routes the tokens of its shard of the sequence to them."""


@dataclass(frozen=True)
class ParallelPlan:
    """How one model is parallelized."""

    tensor_parallel: dict[str, str]
    """Module name -> tensor-parallel style."""
    fsdp_groups: list[list[str]]
    """Names of the modules whose weights FSDP2 gathers together, in the order of use."""


def llama_parallel_plan(layers: int, *, tied: bool, experts: bool = False) -> ParallelPlan:
    """Return the plan of a Llama: an FSDP group for the embedding, one for each block, one for norm and head.

    A tied matrix is used first and last, so it is in no group and stays gathered for the whole pass.
    """
    blocks = [[f"layers.{i}"] for i in range(layers)]
    fsdp_groups = blocks if tied else [["tok_embeddings"], *blocks, ["norm", "output"]]
    return ParallelPlan(EXPERTS if experts else TENSOR_PARALLEL, fsdp_groups)
