"""Token ids and labels: what they must be before a model sees them. Imports nothing of the project."""

from __future__ import annotations

from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position that has no loss."""


def check_token_ids(ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError unless `ids`, of any shape and on the CPU, are whole numbers from 0 to `vocab_size` - 1.

    An embedding reports a wrong one with a traceback, and on a GPU it ends the process without a message.
    """
    if ids.is_floating_point():
        raise ValueError(f"the dataset gives {ids.dtype}, not token ids")
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"token id {low if low < 0 else high} is outside the vocabulary of {vocab_size}")
