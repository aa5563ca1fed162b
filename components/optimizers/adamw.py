"""AdamW, on the local shards of the parameters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field

from components.optimizers.parameter_groups import OptimizedModel, WeightDecayLR, WeightDecayOn, parameter_groups
from components.units import PositiveCount

FUSED_DEVICES = ("cpu", "cuda")
"""Device types for which torch's fused AdamW was measured to be the fastest."""

Beta = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW (arXiv 1711.05101). The learning rate comes from [lr_schedule], times each group's multiplier."""

    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay factors of the two moments, per step."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay: a step shrinks a weight by lr x weight_decay."""
    weight_decay_lr: WeightDecayLR = "schedule"
    """Learning rate that scales weight_decay: the schedule's, equal for all parameters, or the group's, which includes
    the parameter's learning-rate multiplier (muP). Without multipliers both are equal."""
    weight_decay_on: WeightDecayOn = "matrices"
    """Parameters that weight decay applies to: those of two or more dimensions (embeddings, but not norms), all, or
    none."""
    reference_batch_tokens: PositiveCount | None = None
    """Tokens of the global batch that beta2 is given for. At a batch of B tokens it becomes beta2 ** (B / reference), a
    constant half-life in tokens (arXiv 2507.07101). Unset: the same beta2 at every batch size."""

    def build(self, *, model: OptimizedModel) -> torch.optim.Optimizer:
        """Return the optimizer of the parameters of `model`; `param_names` of each group lists those in it."""
        groups = parameter_groups(model.named_parameters(), self, model.lr_multiplier)
        return BatchScaledAdamW(groups, self.options(model), self.reference_batch_tokens)

    def options(self, model: OptimizedModel) -> dict[str, Any]:
        """Return the keyword arguments of torch's AdamW."""
        devices = {parameter.device.type for _, parameter in model.named_parameters()}
        # lr is set before every step; if that were forgotten, 0 would train nothing, which is noticed
        return {"lr": 0.0, "betas": self.betas, "eps": self.eps, "fused": devices <= set(FUSED_DEVICES)}


class LocalAdamW(torch.optim.AdamW):
    """AdamW on the local tensors of DTensors. The update is element-wise, so it needs no communication.

    On DTensors the host would run DTensor dispatch for every parameter.
    """

    def _init_group(self, *arguments: Any) -> bool:
        has_complex: bool = super()._init_group(*arguments)
        for tensors in arguments[1:]:
            tensors[:] = [local_tensor(tensor) for tensor in tensors]
        return has_complex


class BatchScaledAdamW(LocalAdamW):
    """AdamW whose second moment can have a constant half-life in tokens, at any batch size (arXiv 2507.07101).

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

    def __init__(
        self, groups: Iterable[dict[str, Any]], options: dict[str, Any], reference_batch_tokens: int | None
    ) -> None:
        """Without `reference_batch_tokens` beta2 is the same at every batch size."""
        super().__init__(groups, **options)
        self.reference_batch_tokens = reference_batch_tokens
        self.reference_betas: tuple[float, float] = options["betas"]

    def set_batch_tokens(self, batch_tokens: int) -> None:
        """Set the betas for a step of `batch_tokens`, always from the reference betas, so that no rounding
        accumulates."""
        beta1, beta2 = self.reference_betas
        for group in self.param_groups:
            group["betas"] = (beta1, self.scaled_to_batch(beta2, batch_tokens))

    def scaled_to_batch(self, decay: float, batch_tokens: int) -> float:
        """Return the decay factor of a step of `batch_tokens`, given that of a step of the reference batch."""
        reference = self.reference_batch_tokens
        return decay if reference is None else decay ** (batch_tokens / reference)


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's shard of a DTensor, or a plain tensor as it is."""
    local: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    return local
