"""Orthogonalize matrices by a Newton-Schulz iteration, as Muon needs.

K matrices, R rows, C columns
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

CoefficientsName = Literal["quintic", "polar_express"]

COEFFICIENTS: dict[CoefficientsName, tuple[tuple[float, float, float], ...]] = {
    # Jordan et al. 2024, kellerjordan.github.io/posts/muon: the steepest slope at 0. Singular values do not converge;
    # they end between 0.7 and 1.2.
    "quintic": ((3.4445, -4.7750, 2.0315),) * 5,
    # Amsel et al. 2025, arXiv 2505.16932: the best polynomial of each step in turn. These are those that modded-nanogpt
    # computed for 5 steps, with a margin of 2 % above 1.
    "polar_express": (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
}
"""(a, b, c) of each step, which maps every singular value s to a s + b s^3 + c s^5."""
MARGIN: dict[CoefficientsName, float] = {"quintic": 1.0, "polar_express": 1.02}
"""Factor on the norm that matrices are divided by, so that no rounded singular value is above the valid range."""
EPS = 1e-7
"""The smallest norm that a matrix is divided by. A matrix of zeros stays zero."""


def orthogonalize(x_KRC: Tensor, coefficients: CoefficientsName) -> Tensor:
    """Return (K, R, C) with the singular vectors of each matrix, and singular values near 1.

    Computed in the dtype of `x_KRC`. For a matrix U S V^T this approximates the polar factor U V^T. A step takes two
    products of 2 min(R, C)^2 max(R, C) FLOPs and one of 2 min(R, C)^3.
    """
    tall = x_KRC.shape[1] > x_KRC.shape[2]
    if tall:
        x_KRC = x_KRC.mT  # so that the Gram matrix is the smaller one
    # the Frobenius norm bounds the largest singular value
    x_KRC = x_KRC / (x_KRC.norm(dim=(1, 2), keepdim=True) * MARGIN[coefficients]).clamp(min=EPS)
    for a, b, c in COEFFICIENTS[coefficients]:
        gram_KRR = x_KRC @ x_KRC.mT
        polynomial_KRR = torch.baddbmm(gram_KRR, gram_KRR, gram_KRR, beta=b, alpha=c)  # b G + c G^2
        x_KRC = torch.baddbmm(x_KRC, polynomial_KRR, x_KRC, beta=a)  # a X + (b G + c G^2) X
    return x_KRC.mT if tall else x_KRC


def orthogonalize_flops(rows: int, columns: int, steps: int) -> int:
    """Return the FLOPs of orthogonalizing one matrix."""
    small, large = sorted((rows, columns))
    return steps * (4 * small * small * large + 2 * small**3)
