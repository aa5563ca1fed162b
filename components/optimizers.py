"""Optimizers: parameter groups by name, built from TOML."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from components.units import PositiveCount

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
    weight_decay_lr: Literal["schedule", "group"] = "schedule"
    """Which lr that is: the schedule's, the same for all parameters, or times the multiplier of the parameter's group,
    as of muP's narrower steps in a wide model. Without multipliers the two are one."""
    weight_decay_on: Literal["matrices", "all", "none"] = "matrices"
    """What weight decay applies to: parameters of two or more dimensions (embeddings too, norms not), everything, or nothing."""
    reference_batch_tokens: PositiveCount | None = None
    """Tokens of the global batch that the second beta is meant for: at another, its power that keeps the half-life of
    the second moment in tokens (arXiv 2507.07101). Unset: the same beta at every batch."""

    def build(
        self, *, parameters: Iterable[tuple[str, nn.Parameter]], lr_multiplier: Callable[[str], float]
    ) -> torch.optim.Optimizer:
        """One group for each (weight decay, learning-rate multiplier); `param_names` tells what is in it."""
        groups: dict[tuple[float, float], dict[str, Any]] = {}
        for name, parameter in parameters:
            decays = self.weight_decay_on == "all" or (self.weight_decay_on == "matrices" and parameter.ndim >= 2)
            multiplier = lr_multiplier(name)
            if not multiplier >= 0:
                raise ValueError(f"the model gives {name} the learning-rate multiplier {multiplier}: 0 or more, please")
            # torch shrinks by the group's lr, so for the schedule's the multiplier is divided out. An average over
            # 1 / (lr x decay) steps is what weights are, and its length should not change with width (2405.13698).
            # A multiplier of 0 freezes a parameter: it does not decay either.
            decay = self.weight_decay if decays and multiplier else 0.0
            if decay and self.weight_decay_lr == "schedule":
                decay /= multiplier
            settings = {"params": [], "weight_decay": decay, "lr_multiplier": multiplier}
            group = groups.setdefault((decay, multiplier), settings)
            group["params"].append((name, parameter))
        devices = {parameter.device.type for group in groups.values() for _, parameter in group["params"]}
        fused = devices <= set(FUSED_DEVICES)
        # lr is set before every step; 0 makes a forgotten one harmless instead of subtly wrong
        options: dict[str, Any] = {"lr": 0.0, "betas": self.betas, "eps": self.eps, "fused": fused}
        if self.reference_batch_tokens is None:
            return LocalAdamW(list(groups.values()), **options)
        return BatchScaledAdamW(list(groups.values()), self.reference_batch_tokens, options)


class LocalAdamW(torch.optim.AdamW):
    """AdamW on the local tensors of DTensors: the update is element-wise, so a shard needs nothing of the others.

    Over DTensors the host has to work out for every parameter what the update of a shard is.
    """

    def _init_group(self, *arguments: Any) -> bool:
        has_complex: bool = super()._init_group(*arguments)
        for tensors in arguments[1:]:
            tensors[:] = [getattr(tensor, "_local_tensor", tensor) for tensor in tensors]
        return has_complex


class BatchScaledAdamW(LocalAdamW):
    """AdamW whose second moment forgets per token, whatever the batch (arXiv 2507.07101).

    v loses the share beta2 in a step of B0 tokens, so over n tokens beta2^(n / B0); a step of B tokens has to lose
    beta2^(B / B0). What stays as it is:

    - beta1: that paper keeps it, too. Momentum averages over a few steps to smooth them, it does not estimate anything
      over tokens; with a half-life in tokens it would vanish as the batch grows (0.9^8 = 0.43).
    - weight decay: a step shrinks weights by lr x weight_decay, so it follows the rate. Per token it is constant under
      batch_scaling = "linear", and falls as the rate per token does under the others.
    - the bias correction, 1 - beta2^t of t steps at the present beta2: it is off only if the batch changes in the
      first steps, while it matters.

    The reference is no entry of the parameter groups: those are in every checkpoint, and one more would keep a run
    from turning this on when it resumes.
    """

    def __init__(self, groups: list[dict[str, Any]], reference_batch_tokens: int, options: dict[str, Any]) -> None:
        super().__init__(groups, **options)
        self.reference_batch_tokens = reference_batch_tokens
        self.reference_betas: tuple[float, float] = options["betas"]

    def follow_batch(self, batch_tokens: int) -> None:
        """Set the betas for a step of `batch_tokens`; from those of the reference, so that nothing accumulates."""
        beta1, beta2 = self.reference_betas
        for group in self.param_groups:
            group["betas"] = (beta1, beta2 ** (batch_tokens / self.reference_batch_tokens))
