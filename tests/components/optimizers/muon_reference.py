"""Muon and NorMuon written out in float64 for one matrix at a time, from their papers, without code of the product."""

from __future__ import annotations

import math

import torch
from torch import Tensor

QUINTIC = ((3.4445, -4.7750, 2.0315),) * 5
POLAR_EXPRESS = (  # of modded-nanogpt, for matrices that are divided by 1.02 of their norm
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalized(x: Tensor, coefficients: str) -> Tensor:
    """Return five Newton-Schulz steps from (R, C)."""
    quintic = coefficients == "quintic"
    x = x / (x.norm() * (1 if quintic else 1.02))
    for a, b, c in QUINTIC if quintic else POLAR_EXPRESS:
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


class MuonReference:
    """The updates of one parameter, (R, C) or (E, R, C), which concatenates `merged` matrices along its rows."""

    def __init__(
        self, weight: Tensor, *, merged: int = 1, normuon: bool = False, coefficients: str = "polar_express"
    ) -> None:
        self.weight = weight.double()
        self.momentum = torch.zeros_like(self.weight)
        self.squares = torch.zeros(*self.weight.shape[:-1], 1, dtype=torch.float64)
        self.merged, self.normuon, self.coefficients = merged, normuon, coefficients

    def step(self, gradient: Tensor, lr: float, weight_decay: float, *, lr_scale: str = "match_rms_adamw") -> None:
        gradient = gradient.double()
        self.momentum = 0.95 * self.momentum + 0.05 * gradient
        direction = 0.95 * self.momentum + 0.05 * gradient
        self.weight = self.weight * (1 - lr * weight_decay)
        stack = direction if direction.ndim == 3 else direction[None]
        weights = self.weight if self.weight.ndim == 3 else self.weight[None]
        squares = self.squares if self.squares.ndim == 3 else self.squares[None]
        size = stack.shape[1] // self.merged
        for expert in range(len(stack)):
            for part in range(self.merged):
                rows = slice(part * size, (part + 1) * size)
                update = orthogonalized(stack[expert, rows], self.coefficients)
                if self.normuon:
                    average = 0.95 * squares[expert, rows] + 0.05 * update.square().mean(1, keepdim=True)
                    squares[expert, rows] = average
                    scaled = update / (average.sqrt() + 1e-8)
                    update = scaled * (update.norm() / scaled.norm())
                scale = math.sqrt(max(1, size / stack.shape[2]))
                if lr_scale == "match_rms_adamw":
                    scale = 0.2 * math.sqrt(max(size, stack.shape[2]))
                weights[expert, rows] -= lr * scale * update
