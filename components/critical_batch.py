"""Critical batch size from branched training (Merrill et al., arXiv 2505.23971): what the losses of branches say."""

from __future__ import annotations

import math
from collections.abc import Sequence


def smooth_losses(losses: Sequence[float], tokens: Sequence[int], smoothing_tokens: float) -> list[float]:
    """The exponential moving average of each step's loss and those before it, without the bias of its start.

    It decays by 1/e over `smoothing_tokens`. A step counts for the `tokens` it took, so runs whose batches differ are
    averaged over the same stretch of data. A loss that is not finite leaves the average as it was; before the first
    finite one it is nan.
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
    """Whether a branch's loss is at most `tolerance` above that of the first branch; one that is not finite is not."""
    return loss - first <= tolerance if math.isfinite(loss) else False


def largest_factor(factors: Sequence[int], losses: Sequence[float], tolerance: float) -> int:
    """k*: the largest factor whose loss, and that of all smaller ones, stays within `tolerance` of the first.

    A larger batch that comes back into it by chance does not count.
    """
    best = factors[0]
    for factor, loss in zip(factors, losses, strict=True):
        if not is_within_tolerance(loss, losses[0], tolerance):
            break
        best = factor
    return best
