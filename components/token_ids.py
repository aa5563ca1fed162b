"""Validation of token ids and labels. This module imports nothing of the project."""

from __future__ import annotations

from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position that is excluded from the loss."""


def check_token_ids(ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError unless `ids`, on the CPU and of any shape, are integers from 0 to `vocab_size` - 1.

    On a GPU an id out of range kills the process without a message.
    """
    if ids.is_floating_point():
        raise ValueError(f"the dataset returns {ids.dtype}; token ids must be integers")
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"token id {low if low < 0 else high} is outside the vocabulary of {vocab_size}")
