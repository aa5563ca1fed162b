"""Critical batch size from branched training (Merrill et al., arXiv 2505.23971): evaluation of the branches' losses."""

from __future__ import annotations

import math
from collections.abc import Sequence


def smooth_losses(losses: Sequence[float], tokens: Sequence[int], smoothing_tokens: float) -> list[float]:
    """Return the exponential moving average of the losses at each step, with bias correction.

    Weights decay to 1/e over `smoothing_tokens`. A step is weighted by its `tokens`, so that runs with different batch
    sizes are averaged over the same amount of data. Losses that are not finite are ignored; before the first finite one
    the average is nan.
    """
    curve, total, weight = [], 0.0, 0.0
    for loss, taken in zip(losses, tokens, strict=True):
        if math.isfinite(loss):
            keep = math.exp(-taken / smoothing_tokens)
            total = keep * total + (1 - keep) * loss
            weight = keep * weight + (1 - keep)
        curve.append(total / weight if weight else math.nan)
    return curve


def is_within_tolerance(loss: float, first: float, tolerance: float) -> bool:
    """Return whether a branch's loss is finite and at most `tolerance` above `first`, that of the first branch."""
    return loss - first <= tolerance if math.isfinite(loss) else False


def largest_factor(factors: Sequence[int], losses: Sequence[float], tolerance: float) -> int:
    """Return k*: the largest factor up to which all losses stay within `tolerance` of the first.

    A larger factor that is within tolerance again, by chance, does not count.
    """
    best = factors[0]
    for factor, loss in zip(factors, losses, strict=True):
        if not is_within_tolerance(loss, losses[0], tolerance):
            break
        best = factor
    return best
