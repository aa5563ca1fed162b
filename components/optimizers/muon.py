"""Muon: the momentum of every matrix is orthogonalized before it is subtracted. Other parameters use AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Literal, Protocol, runtime_checkable

import torch
from pydantic import Field
from torch import nn

from components.errors import InputError
from components.interfaces import UpdateCost
from components.optimizers.adamw import AdamW, Beta, OptimizedModel
from components.optimizers.muon_step import LRScale, MatrixParameter, MuonOptimizer
from components.optimizers.orthogonalize import COEFFICIENTS, CoefficientsName, orthogonalize_flops
from components.units import PositiveCount

ROUTERS = ("*router.weight",)
"""The default of `adamw_on`. The rows of a router are one per expert, and not features."""


@runtime_checkable
class DescribesMatrices(Protocol):
    """A model that tells Muon about its matrices. For others, each parameter is one matrix of multiplier 1."""

    def muon_lr_multiplier(self, name: str, lr_scale: LRScale, *, per_head: bool) -> float:
        """Return the factor on the learning rate of the matrix `name`, given the scale of its updates, and whether the
        heads of a query or key projection are matrices by themselves."""
        ...

    def merged_matrices(self, name: str, *, per_head: bool) -> int:
        """Return how many matrices of equal size `name` concatenates along its rows: 2 for a merged gate and up
        projection, and with `per_head` the heads of a query or key projection."""
        ...


@dataclass(frozen=True, kw_only=True)
class Muon(AdamW):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for the matrices of the blocks, AdamW for all other
    parameters. The inherited keys are those of AdamW; the ones of weight decay apply to both."""

    momentum: Beta = 0.95
    """Decay factor of the momentum of the matrices, per step. It is Nesterov's."""
    momentum_half_life_tokens: PositiveCount | None = None
    """Half-life of the momentum in tokens: a step of B tokens multiplies it by 0.5 ** (B / half-life), in place of
    `momentum`. Unset: `momentum` at every batch size."""
    variant: Literal["muon", "normuon"] = "muon"
    """"normuon" also divides each row of an update by its RMS, averaged over steps, and keeps the norm of the update
    (arXiv 2510.05491)."""
    normuon_beta2: Beta = 0.95
    """Decay factor of the mean squares of "normuon", per step, or per step of `reference_batch_tokens`."""
    coefficients: CoefficientsName = "polar_express"
    """Newton-Schulz iteration: "quintic" of the original Muon, or "polar_express" (arXiv 2505.16932), which is closer
    to orthogonal at the same cost."""
    lr_scale: LRScale = "match_rms_adamw"
    """Scale of the updates of an R x C matrix. "match_rms_adamw": 0.2 sqrt(max(R, C)), which gives them the RMS of
    AdamW's updates, so that its learning rate and weight decay apply (Moonlight, arXiv 2502.16982). "spectral":
    sqrt(max(1, R / C)), for learning rates near 0.02 (Jordan et al. 2024)."""
    lr_factor: Annotated[float, Field(gt=0)] = 1.0
    """Factor on the learning rate of Muon's matrices; that of AdamW's parameters is the schedule's."""
    muon_on: tuple[str, ...] = ("layers.*",)
    """Patterns of the names of parameters; Muon updates those of two or three dimensions, and of three each matrix."""
    adamw_on: tuple[str, ...] = ROUTERS
    """Patterns of the names of matrices that AdamW updates although `muon_on` matches."""
    per_head: bool = False
    """Orthogonalize each head of the query and key projections by itself."""
    compute_dtype: Literal["auto", "bf16", "float32"] = "auto"
    """dtype of orthogonalization and of what processes exchange for it. "auto": bf16 on CUDA, else that of the
    parameters."""

    def build(self, *, model: OptimizedModel) -> torch.optim.Optimizer:
        """Return the optimizer. Raises InputError if a pattern matches nothing, or no matrix is left for Muon."""
        on_muon = self._names_on_muon(dict(model.named_parameters()))
        multiplier = self._muon_multiplier(model)
        split = [(name, parameter, name in on_muon) for name, parameter in model.named_parameters()]
        matrices = self.parameter_groups([(n, p) for n, p, on in split if on], multiplier)
        others = self.parameter_groups([(n, p) for n, p, on in split if not on], model.lr_multiplier)
        described = [
            MatrixParameter(name, parameter, self._merged(model, name))
            for group in matrices
            for name, parameter in group["params"]
        ]
        return MuonOptimizer(self, matrices, others, described, self.options(model))

    def update_cost(self, model: OptimizedModel) -> UpdateCost:
        """Return the cost of one step of `model`, which is not sharded."""
        parameters = dict(model.named_parameters())
        flops, elements = 0, 0
        for name in self._names_on_muon(parameters):
            merged = self._merged(model, name)
            *experts, rows, columns = parameters[name].shape
            steps = len(COEFFICIENTS[self.coefficients])
            flops += math.prod(experts) * merged * orthogonalize_flops(rows // merged, columns, steps)
            elements += parameters[name].numel()
        return UpdateCost(flops, elements)

    def _names_on_muon(self, parameters: dict[str, nn.Parameter]) -> set[str]:
        """Return the names of the parameters that Muon updates."""
        for key, patterns in (("muon_on", self.muon_on), ("adamw_on", self.adamw_on)):
            for pattern in patterns:
                if pattern not in ROUTERS and not any(fnmatchcase(name, pattern) for name in parameters):
                    raise InputError(key, f"{pattern!r} matches no parameter; they are {_shortened(list(parameters))}")
        chosen = {
            name
            for name, parameter in parameters.items()
            if parameter.requires_grad
            and parameter.ndim >= 2
            and any(fnmatchcase(name, pattern) for pattern in self.muon_on)
            and not any(fnmatchcase(name, pattern) for pattern in self.adamw_on)
        }
        for name in chosen:
            if parameters[name].ndim > 3:
                raise InputError(
                    "muon_on",
                    f"{name} has {parameters[name].ndim} dimensions; Muon updates matrices, and stacks of matrices of "
                    "3 dimensions. Add it to optimizer.adamw_on",
                )
        if not chosen:
            raise InputError(
                "muon_on", f"{list(self.muon_on)} leaves no matrix for Muon; use components.optimizers:AdamW"
            )
        return chosen

    def _merged(self, model: OptimizedModel, name: str) -> int:
        """Return how many matrices of equal size the parameter `name` concatenates along its rows."""
        return model.merged_matrices(name, per_head=self.per_head) if isinstance(model, DescribesMatrices) else 1

    def _muon_multiplier(self, model: OptimizedModel) -> Callable[[str], float]:
        """Return the function from the name of a matrix to the factor on the learning rate of its group."""
        if isinstance(model, DescribesMatrices):
            return lambda name: self.lr_factor * model.muon_lr_multiplier(name, self.lr_scale, per_head=self.per_head)

        def multiplier(name: str) -> float:
            of_adam = model.lr_multiplier(name)
            if of_adam not in (0.0, 1.0):
                raise InputError(
                    "muon_on",
                    f"the model's lr_multiplier({name!r}) is {of_adam:g}, which holds for AdamW only; give the model "
                    "muon_lr_multiplier(name, lr_scale, per_head=...) and merged_matrices(name, per_head=...)",
                )
            return self.lr_factor * of_adam

        return multiplier


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
