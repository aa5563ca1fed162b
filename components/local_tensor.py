"""The shard of a DTensor that this process holds. This module imports nothing of the project."""

from __future__ import annotations

from torch import Tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this process's shard of a DTensor, or a plain tensor as it is.

    It shares its memory with `tensor`. Unlike `DTensor.to_local`, it is not a function of autograd.
    """
    local: Tensor = getattr(tensor, "_local_tensor", tensor)
    return local
