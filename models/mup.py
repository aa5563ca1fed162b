"""Maximal update parametrization (muP; Yang et al. 2022, arXiv 2203.03466): one learning rate for every width.

The variant of PowerLM (arXiv 2408.13359), which divides the logits by the width multiple, so that the embedding and the
output matrix have the same rules and can be tied. CompleteP (Dey et al. 2025, arXiv 2505.01618, alpha = 1) extends it
to one learning rate for every depth. Rules are selected by parameter name, not by attributes of tensors,
which FSDP2 and DTensor would lose. See docs/mup.md.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from components.units import PositiveCount

Multiplier = Annotated[float, Field(gt=0)]


class Rule(NamedTuple):
    """Powers of m_width = dim / base_width."""

    init_std: float
    """Exponent of the factor on the initial standard deviation."""
    lr: float
    """Exponent of the factor on the learning rate."""


RULES = {
    "tok_embeddings.weight": Rule(init_std=0, lr=0),  # also the head, if tied
    "output.weight": Rule(init_std=0, lr=0),
    "layers.*.attention.w*.weight": Rule(init_std=-0.5, lr=-1),
    "layers.*.attention.w*.bias": Rule(init_std=0, lr=0),
    "layers.*.feed_forward.w_*.weight": Rule(init_std=-0.5, lr=-1),  # also those of experts
    "layers.*.feed_forward.router.weight": Rule(init_std=-0.5, lr=-1),
    "*norm.weight": Rule(init_std=0, lr=0),
}
"""Parameter name -> rule. In a wider model, matrices from width to width have smaller initial weights and learning
rates; other parameters are unchanged.

Equal for all parameters: Adam's eps is not scaled, and weight decay uses the learning rate of the schedule (the
optimizer's `weight_decay_lr`).
"""


@dataclass(frozen=True, kw_only=True)
class MuP:
    """The multipliers of muP, and its factors on initialization and learning rate."""

    base_width: int = 256
    """The width at which all factors are 1, where the learning rate was tuned."""
    embedding_multiplier: float = 1.0
    """Factor on the output of the embedding."""
    residual_multiplier: float = 1.0
    """Factor on the outputs of attention and feed-forward before they are added to the residual stream."""

    depth: Literal["off", "completep"] = "off"
    """"completep": residual branches are divided by layers / base_layers (CompleteP)."""
    base_layers: int = 2
    """The number of layers at which CompleteP's factor is 1."""

    def residual_factor(self, layers: int) -> float:
        """Return the factor on the outputs of attention and feed-forward in a model of `layers` layers."""
        if self.depth == "off":
            return self.residual_multiplier
        return self.residual_multiplier * self.base_layers / layers

    def width_multiple(self, dim: int) -> float:
        """Return m_width = dim / base_width, by which logits are divided."""
        return dim / self.base_width

    def init_std_factor(self, name: str, dim: int) -> float:
        return float(self.width_multiple(dim) ** rule_of(name).init_std)

    def lr_factor(self, name: str, dim: int) -> float:
        return float(self.width_multiple(dim) ** rule_of(name).lr)

    def muon_lr_factor(self, name: str, dim: int, lr_scale: str, *, by_head: bool) -> float:
        """Return the factor on the learning rate of a matrix that Muon updates. Raises ValueError for other names.

        The spectral norm of an update should grow as sqrt(rows / columns) (Yang et al. 2023, arXiv 2310.17813): not at
        all for matrices from width to width, and with 1 / sqrt(width) for one head of queries or keys, whose rows are
        fixed. Adam's updates have elements near 1, and a spectral norm that grows with the width; Muon's have a fixed
        one ("spectral"), or one that grows with the root of the width ("match_rms_adamw").
        """
        if rule_of(name).lr != -1:
            raise ValueError(f"muP has no rule for {name} under Muon; add it to optimizer.adamw_on")
        exponent = -0.5 * ((lr_scale == "match_rms_adamw") + by_head)
        return float(self.width_multiple(dim) ** exponent)


def rule_of(name: str) -> Rule:
    """Return the first matching rule. Raises ValueError for a parameter without a rule."""
    for pattern, rule in RULES.items():
        if fnmatchcase(name, pattern):
            return rule
    raise ValueError(f"muP has no rule for the parameter {name}; add one to models/mup.py")


@dataclass(frozen=True, kw_only=True)
class MuPConfig:
    """[model.mup]: muP. Unset keys have the value of the preset, or the stated default if that has no muP."""

    enabled: bool = True
    """false: disable muP, also for a preset that has it."""
    base_width: PositiveCount | None = None
    """The width (dim) at which all factors are 1; default 256."""
    embedding_multiplier: Multiplier | None = None
    """Factor on the output of the embedding; default 1."""
    residual_multiplier: Multiplier | None = None
    """Factor on the outputs of attention and feed-forward before they are added to the residual stream; default 1."""
    depth: Literal["off", "completep"] | None = None
    """"completep": divide that factor by layers / base_layers, and do not scale initial weights with depth, so that one
    learning rate also fits every number of layers (Dey et al. 2025, arXiv 2505.01618); default "off"."""
    base_layers: PositiveCount | None = None
    """The number of layers where the learning rate was tuned, for depth = "completep"; default 2."""

    def override(self, of_preset: MuP | None) -> MuP | None:
        """Return the muP of a preset with these keys applied; None if disabled."""
        if not self.enabled:
            return None
        keys = {field.name: getattr(self, field.name) for field in fields(MuP)}
        return replace(of_preset or MuP(), **{key: value for key, value in keys.items() if value is not None})
