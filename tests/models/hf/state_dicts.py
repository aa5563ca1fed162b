"""State dicts under Hugging Face names and back, as import and export do it file by file."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from models.hf.weights import hf_parts, stored_parts
from models.presets import LlamaShape


def to_hf(weights: Mapping[str, Tensor], size: LlamaShape) -> dict[str, Tensor]:
    """Return the same tensors under Hugging Face names. A tied head is stored once, as the embedding."""
    parts = hf_parts(size)
    assert weights.keys() == {part.name for part in parts.values()}
    return {theirs: part.of(weights[part.name]).contiguous() for theirs, part in parts.items()}


def from_hf(weights: Mapping[str, Tensor], size: LlamaShape) -> dict[str, Tensor]:
    """Return the same tensors under our names, as `stored_parts` finds them; every parameter is one tensor."""
    return {part.name: weights[theirs] for theirs, part in stored_parts(weights, size).items()}


def names_in_hf(size: LlamaShape) -> dict[str, str]:
    """Return our name -> Hugging Face name, of a family that stores every parameter as one tensor."""
    return {part.name: theirs for theirs, part in hf_parts(size).items()}
