"""How a Llama is divided among processes: tables by module name, in the words of distributed/tensor_parallel."""

from __future__ import annotations

from dataclasses import dataclass

TENSOR_PARALLEL = {
    "tok_embeddings": "embedding",
    "layers.*.attention_norm": "sequence",
    "layers.*.attention": "gather sequence",
    "layers.*.attention.wq": "columns",
    "layers.*.attention.wk": "columns",
    "layers.*.attention.wv": "columns",
    "layers.*.attention.wo": "rows",
    "layers.*.ffn_norm": "sequence",
    "layers.*.feed_forward": "gather sequence",
    "layers.*.feed_forward.w_gate": "columns",
    "layers.*.feed_forward.w_up": "columns",
    "layers.*.feed_forward.w_down": "rows",
    "norm": "sequence",
    "output": "vocabulary",
}
"""Columns are output features of a matrix, and rows its input features: a pair of them needs one exchange."""
_DENSE = "layers.*.feed_forward"
EXPERTS = {name: style for name, style in TENSOR_PARALLEL.items() if not name.startswith(_DENSE)} | {
    "layers.*.feed_forward": "own tokens",
    "router_loss": "all tokens",
}
"""Experts are whole on every rank, and each rank's are sent the tokens of its part of the sequence."""


@dataclass(frozen=True)
class ParallelPlan:
    """A division of one model."""

    tensor_parallel: dict[str, str]
    """Module name -> style."""
    units: list[list[str]]
    """Modules whose weights are gathered together, in the order of their use."""


def llama_parallel_plan(layers: int, *, tied: bool, experts: bool = False) -> ParallelPlan:
    """A unit for each block, one before for the embedding and one after for norm and head.

    A tied matrix is used first and last: it stays with what no unit holds and is gathered for the whole pass.
    """
    blocks = [[f"layers.{i}"] for i in range(layers)]
    units = blocks if tied else [["tok_embeddings"], *blocks, ["norm", "output"]]
    return ParallelPlan(EXPERTS if experts else TENSOR_PARALLEL, units)
