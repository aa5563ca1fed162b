"""Optimizers, and their parameter groups by weight decay and learning-rate multiplier."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from components.units import PositiveCount

FUSED_DEVICES = ("cpu", "cuda")
"""Device types for which torch's fused AdamW was measured to be the fastest."""


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW (arXiv 1711.05101). The learning rate comes from [lr_schedule], times each group's multiplier."""

    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Decay factors of the two moments, per step."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay: a step shrinks a weight by lr x weight_decay."""
    weight_decay_lr: Literal["schedule", "group"] = "schedule"
    """Learning rate that scales weight_decay: the schedule's, equal for all parameters, or the group's, which includes
    the parameter's learning-rate multiplier (muP). Without multipliers both are equal."""
    weight_decay_on: Literal["matrices", "all", "none"] = "matrices"
    """Parameters that weight decay applies to: those of two or more dimensions (embeddings, but not norms), all, or
    none."""
    reference_batch_tokens: PositiveCount | None = None
    """Tokens of the global batch that beta2 is given for. At a batch of B tokens it becomes beta2 ** (B / reference), a
    constant half-life in tokens (arXiv 2507.07101). Unset: the same beta2 at every batch size."""

    def build(
        self, *, parameters: Iterable[tuple[str, nn.Parameter]], lr_multiplier: Callable[[str], float]
    ) -> torch.optim.Optimizer:
        """Return the optimizer, with one group for each (weight decay, multiplier); `param_names` lists its
        parameters."""
        groups: dict[tuple[float, float], dict[str, Any]] = {}
        for name, parameter in parameters:
            decays = self.weight_decay_on == "all" or (self.weight_decay_on == "matrices" and parameter.ndim >= 2)
            multiplier = lr_multiplier(name)
            if not multiplier >= 0:
                raise ValueError(f"lr_multiplier({name!r}) is {multiplier}; the model must return 0 or more")
            # torch scales weight decay by the group's lr, so for "schedule" the multiplier is divided out. Weights are
            # an average over about 1 / (lr x decay) updates, whose length should not depend on width (arXiv
            # 2405.13698). A multiplier of 0 freezes a parameter, which then does not decay either.
            decay = self.weight_decay if decays and multiplier else 0.0
            if decay and self.weight_decay_lr == "schedule":
                decay /= multiplier
            settings = {"params": [], "weight_decay": decay, "lr_multiplier": multiplier}
            group = groups.setdefault((decay, multiplier), settings)
            group["params"].append((name, parameter))
        devices = {parameter.device.type for group in groups.values() for _, parameter in group["params"]}
        fused = devices <= set(FUSED_DEVICES)
        # lr is set before every step; if that were forgotten, 0 would train nothing, which is noticed
        options: dict[str, Any] = {"lr": 0.0, "betas": self.betas, "eps": self.eps, "fused": fused}
        if self.reference_batch_tokens is None:
            return LocalAdamW(list(groups.values()), **options)
        return BatchScaledAdamW(list(groups.values()), self.reference_batch_tokens, options)


class LocalAdamW(torch.optim.AdamW):
    """AdamW on the local tensors of DTensors. The update is element-wise, so it needs no communication.

    On DTensors the host would run DTensor dispatch for every parameter.
    """

    def _init_group(self, *arguments: Any) -> bool:
        has_complex: bool = super()._init_group(*arguments)
        for tensors in arguments[1:]:
            tensors[:] = [getattr(tensor, "_local_tensor", tensor) for tensor in tensors]
        return has_complex


class BatchScaledAdamW(LocalAdamW):
    """AdamW whose second moment has a constant half-life in tokens, at any batch size (arXiv 2507.07101).

    A step of the reference batch B0 multiplies v by beta2, so a step of B tokens multiplies it by beta2^(B / B0).
    Unchanged are:

    - beta1, as in the paper. Momentum smooths over a few steps; with a half-life in tokens it would vanish as the batch
      grows (0.9^8 = 0.43).
    - weight decay: a step shrinks weights by lr x weight_decay. Per token that is constant with batch_scaling =
      "linear", and falls like lr per token otherwise.
    - the bias correction, 1 - beta2^t for t steps at the current beta2. It is inexact only if the batch changes during
      the first steps.

    The reference batch is not stored in the parameter groups: they are saved in checkpoints, and an additional entry
    would prevent a resumed run from enabling it.
    """

    def __init__(self, groups: list[dict[str, Any]], reference_batch_tokens: int, options: dict[str, Any]) -> None:
        super().__init__(groups, **options)
        self.reference_batch_tokens = reference_batch_tokens
        self.reference_betas: tuple[float, float] = options["betas"]

    def set_batch_tokens(self, batch_tokens: int) -> None:
        """Set the betas for a step of `batch_tokens`, always from the reference betas, so that no rounding
        accumulates."""
        beta1, beta2 = self.reference_betas
        for group in self.param_groups:
            group["betas"] = (beta1, beta2 ** (batch_tokens / self.reference_batch_tokens))
