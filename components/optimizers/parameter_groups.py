"""Parameter groups by weight decay and learning-rate multiplier."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, Protocol

from torch import nn

WeightDecayOn = Literal["matrices", "all", "none"]
WeightDecayLR = Literal["schedule", "group"]


class OptimizedModel(Protocol):
    """The model whose parameters an optimizer updates."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def lr_multiplier(self, name: str) -> float:
        """Return the factor on the learning rate of the parameter `name` for an element-wise update, as of Adam."""
        ...


class WeightDecay(Protocol):
    """The keys of an optimizer that concern weight decay."""

    @property
    def weight_decay(self) -> float: ...
    @property
    def weight_decay_lr(self) -> WeightDecayLR: ...
    @property
    def weight_decay_on(self) -> WeightDecayOn: ...


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], keys: WeightDecay, lr_multiplier: Callable[[str], float]
) -> list[dict[str, Any]]:
    """Return one group for each (weight decay, multiplier) of `parameters`.

    `lr` is set before every step to that of the schedule times `lr_multiplier`. torch adds `param_names`.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in parameters:
        decays = keys.weight_decay_on == "all" or (keys.weight_decay_on == "matrices" and parameter.ndim >= 2)
        multiplier = lr_multiplier(name)
        if not multiplier >= 0:
            raise ValueError(f"lr_multiplier({name!r}) is {multiplier}; the model must return 0 or more")
        # torch scales weight decay by the group's lr, so for "schedule" the multiplier is divided out. Weights are an
        # average over about 1 / (lr x decay) updates, whose length should not depend on width (arXiv 2405.13698). A
        # multiplier of 0 freezes a parameter, which then does not decay either.
        decay = keys.weight_decay if decays and multiplier else 0.0
        if decay and keys.weight_decay_lr == "schedule":
            decay /= multiplier
        settings = {"params": [], "weight_decay": decay, "lr_multiplier": multiplier}
        groups.setdefault((decay, multiplier), settings)["params"].append((name, parameter))
    return list(groups.values())
