"""Optimizers: parameter groups by name, built from TOML."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

FUSED_DEVICES = ("cpu", "cuda")
"""Where torch has a fused AdamW that we have measured to be the fastest."""


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW (arXiv 1711.05101). The learning rate comes from [lr_schedule], times each group's multiplier."""

    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Decay rates of the two moments, per step."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled decay; the step shrinks a weight by lr x weight_decay."""
    decay: Literal["matrices", "all", "none"] = "matrices"
    """What decays: parameters of two or more dimensions (embeddings too, norms not), everything, or nothing."""

    def build(
        self, *, parameters: Iterable[tuple[str, nn.Parameter]], lr_multiplier: Callable[[str], float]
    ) -> torch.optim.Optimizer:
        """One group for each (weight decay, learning-rate multiplier); `param_names` tells what is in it."""
        groups: dict[tuple[float, float], dict[str, Any]] = {}
        for name, parameter in parameters:
            decays = self.decay == "all" or (self.decay == "matrices" and parameter.ndim >= 2)
            key = (self.weight_decay if decays else 0.0, lr_multiplier(name))
            group = groups.setdefault(key, {"params": [], "weight_decay": key[0], "lr_multiplier": key[1]})
            group["params"].append((name, parameter))
        devices = {parameter.device.type for group in groups.values() for _, parameter in group["params"]}
        fused = devices <= set(FUSED_DEVICES)
        # lr is set before every step; 0 makes a forgotten one harmless instead of subtly wrong
        return torch.optim.AdamW(list(groups.values()), lr=0.0, betas=self.betas, eps=self.eps, fused=fused)
