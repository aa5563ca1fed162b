"""AdamW, on the local shards of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field
from torch import nn
from torch.optim.adamw import adamw

from components.local_tensor import local_tensor
from components.optimizers.stochastic_rounding import round_at_random, rounding_key
from components.units import PositiveCount

FUSED_DEVICES = ("cpu", "cuda")
"""Device types for which torch's fused AdamW was measured to be the fastest."""

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizedModel(Protocol):
    """The model whose parameters an optimizer updates."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def lr_multiplier(self, name: str) -> float:
        """Return the factor on the learning rate of the parameter `name` for an element-wise update, as of Adam."""
        ...


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW (arXiv 1711.05101). The learning rate comes from [lr_schedule], times each group's multiplier."""

    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay factors of the two moments, per step."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay: a step shrinks a weight by lr x weight_decay."""
    weight_decay_lr: Literal["schedule", "group"] = "schedule"
    """Learning rate that scales weight_decay: the schedule's, equal for all parameters, or the group's, which includes
    the parameter's learning-rate multiplier (muP). Without multipliers both are equal."""
    weight_decay_on: Literal["matrices", "all", "none"] = "matrices"
    """Parameters that decay: those of two or more dimensions (embeddings, but not norms), all, or none."""
    reference_batch_tokens: PositiveCount | None = None
    """Tokens of the global batch that beta2 is given for. At a batch of B tokens it becomes beta2 ** (B / reference), a
    constant half-life in tokens (arXiv 2507.07101). Unset: the same beta2 at every batch size."""
    state_dtype: Literal["float32", "bf16"] = "float32"
    """dtype of AdamW's first moment; the second one stays float32. "bf16" takes 2 bytes per parameter less, and rounds
    at random, so that the rounding errors of many steps have a mean of zero."""

    def build(self, *, model: OptimizedModel) -> torch.optim.Optimizer:
        """Return the optimizer of the parameters of `model`; `param_names` of each group lists those in it."""
        groups = self.parameter_groups(model.named_parameters(), model.lr_multiplier)
        return BatchScaledAdamW(groups, self.options(model), self.reference_batch_tokens, self.moment_dtype)

    def parameter_groups(
        self, parameters: Iterable[tuple[str, nn.Parameter]], lr_multiplier: Callable[[str], float]
    ) -> list[dict[str, Any]]:
        """Return one group for each (weight decay, multiplier) of `parameters`.

        `lr` is set before every step to that of the schedule times `lr_multiplier`. torch adds `param_names`.
        """
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
            groups.setdefault((decay, multiplier), settings)["params"].append((name, parameter))
        return list(groups.values())

    @property
    def moment_dtype(self) -> torch.dtype:
        """The dtype of the first moment."""
        return torch.bfloat16 if self.state_dtype == "bf16" else torch.float32

    def options(self, model: OptimizedModel) -> dict[str, Any]:
        """Return the keyword arguments of torch's AdamW."""
        devices = {parameter.device.type for _, parameter in model.named_parameters()}
        # lr is set before every step; if that were forgotten, 0 would train nothing, which is noticed
        return {"lr": 0.0, "betas": self.betas, "eps": self.eps, "fused": devices <= set(FUSED_DEVICES)}


class BatchScaledAdamW(torch.optim.AdamW):
    """AdamW on the local tensors of DTensors. The update is element-wise, so it needs no communication; on DTensors the
    host would run DTensor dispatch for every parameter.

    The second moment can have a constant half-life in tokens, at any batch size (arXiv 2507.07101): a step of the
    reference batch B0 multiplies v by beta2, so a step of B tokens multiplies it by beta2^(B / B0). Unchanged are:

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
        self,
        groups: Iterable[dict[str, Any]],
        options: dict[str, Any],
        reference_batch_tokens: int | None,
        moment_dtype: torch.dtype,
    ) -> None:
        """Without `reference_batch_tokens` beta2 is the same at every batch size. `moment_dtype` is that of the first
        moment: float32, or bfloat16."""
        super().__init__(groups, **options)
        self.reference_batch_tokens = reference_batch_tokens
        self.reference_betas: tuple[float, float] = options["betas"]
        self.moment_dtype = moment_dtype
        self._rounding_keys: dict[torch.Tensor, int] = {}
        if moment_dtype != torch.float32:
            for group in self.param_groups:
                for name, parameter in zip(group["param_names"], group["params"], strict=True):
                    self._create_state(parameter)
                    self._rounding_keys[parameter] = rounding_key(name, parameter)

    def set_batch_tokens(self, batch_tokens: int) -> None:
        """Set the betas for a step of `batch_tokens`, from the reference betas, so that no rounding accumulates."""
        beta1, beta2 = self.reference_betas
        for group in self.param_groups:
            group["betas"] = (beta1, self.scaled_to_batch(beta2, batch_tokens))

    def scaled_to_batch(self, decay: float, batch_tokens: int) -> float:
        """Return the decay factor of a step of `batch_tokens`, given that of a step of the reference batch."""
        reference = self.reference_batch_tokens
        return decay if reference is None else decay ** (batch_tokens / reference)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step. On a CUDA device it is skipped where `found_inf` is 1."""
        loss: float | None
        if self.moment_dtype == torch.float32:
            loss = super().step(closure)
            return loss
        loss = None if closure is None else closure()
        for group in self.param_groups:
            self._step_with_rounded_moment(group)
        return loss

    def second_moments(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, float, float]]:
        """Yield each parameter that has a state, v without the bias of its start, its learning-rate multiplier and eps.
        v is sharded like the parameter, and nan before its first update."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if state := self.state.get(parameter):
                    corrected = 1 - group["betas"][1] ** local_tensor(state["step"])
                    moment = state["exp_avg_sq"] / corrected.to(parameter.device)
                    yield parameter, moment, group["lr_multiplier"], group["eps"]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._restore_moment_dtype()

    def _init_group(self, *arguments: Any) -> bool:
        has_complex: bool = super()._init_group(*arguments)
        for tensors in arguments[1:]:
            tensors[:] = [local_tensor(tensor) for tensor in tensors]
        return has_complex

    def _create_state(self, parameter: torch.Tensor) -> None:
        """Create the state of a parameter as torch's AdamW does at its first gradient."""
        if parameter.requires_grad:
            device = parameter.device if self.defaults["fused"] else "cpu"
            self.state[parameter] = {
                "step": torch.zeros((), device=device),
                "exp_avg": torch.zeros_like(parameter, dtype=self._dtype_of_moment(parameter)),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def _dtype_of_moment(self, parameter: torch.Tensor) -> torch.dtype:
        return parameter.dtype if self.moment_dtype == torch.float32 else self.moment_dtype

    def _restore_moment_dtype(self) -> None:
        """Undo the cast to the dtype of the parameters in torch's `load_state_dict`, which is exact."""
        for parameter, state in self.state.items():
            if "exp_avg" in state and self.moment_dtype != torch.float32:
                state["exp_avg"] = state["exp_avg"].to(self._dtype_of_moment(parameter))

    def _step_with_rounded_moment(self, group: dict[str, Any]) -> None:
        """Update one group, a few tensors at a time, with float32 copies of their first moments."""
        parameters, gradients, moments, squares, unused, steps = ([] for _ in range(6))  # type: ignore[var-annotated]
        self._init_group(group, parameters, gradients, moments, squares, unused, steps)
        keys = [self._rounding_keys[parameter] for parameter in group["params"] if parameter.grad is not None]
        for part in _parts(moments):
            copies = [moment.float() for moment in moments[part]]
            adamw(
                parameters[part],
                gradients[part],
                copies,
                squares[part],
                [],
                steps[part],
                fused=group["fused"],
                found_inf=getattr(self, "found_inf", None),
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            for moment, copy, step, key in zip(moments[part], copies, steps[part], keys[part], strict=True):
                moment.copy_(round_at_random(copy, step, key))


MOMENT_ELEMENTS = 2**24
"""Elements whose first moments have a float32 copy at a time."""


def _parts(tensors: Sequence[torch.Tensor]) -> Iterator[slice]:
    """Yield slices of `tensors` of about MOMENT_ELEMENTS elements, at least one tensor each."""
    first, elements = 0, 0
    for index, tensor in enumerate(tensors):
        if elements and elements + tensor.numel() > MOMENT_ELEMENTS:
            yield slice(first, index)
            first, elements = index, 0
        elements += tensor.numel()
    if first < len(tensors):
        yield slice(first, len(tensors))
