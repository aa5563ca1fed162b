"""State dicts under Hugging Face names and back, as import and export do it file by file."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from models.hf.weights import hf_names, stored_names
from models.presets import LlamaShape


def to_hf(weights: Mapping[str, Tensor], size: LlamaShape) -> dict[str, Tensor]:
    """Return the same tensors under Hugging Face names. A tied head is stored once, as the embedding."""
    table = hf_names(size)
    assert weights.keys() == table.keys()
    return {table[name]: weight for name, weight in weights.items()}


def from_hf(weights: Mapping[str, Tensor], size: LlamaShape) -> dict[str, Tensor]:
    """Return the same tensors under our names, as `stored_names` finds them."""
    return {ours: weights[theirs] for ours, theirs in stored_names(weights, size).items()}
