"""Maximal update parametrisation (muP; Yang et al. 2022, arXiv 2203.03466): one learning rate for every width.

In the form of PowerLM (arXiv 2408.13359), whose output divides by the width's multiple: input and output matrix then
follow the same rules, so they may be one. Rules go by the name of a parameter and never by a mark on the tensor, which
FSDP2 and DTensor would lose. docs/mup.md gives the reasons.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, NamedTuple

from pydantic import Field

from components.units import PositiveCount

Multiplier = Annotated[float, Field(gt=0)]


class Rule(NamedTuple):
    """Powers of m_width = dim / base_width."""

    init_std: float
    """Of the factor on the standard deviation at the start."""
    lr: float
    """Of the factor on the learning rate."""


RULES = {
    "tok_embeddings.weight": Rule(init_std=0, lr=0),  # tied, it is the head as well
    "output.weight": Rule(init_std=0, lr=0),
    "layers.*.attention.w*.weight": Rule(init_std=-0.5, lr=-1),
    "layers.*.feed_forward.w_*.weight": Rule(init_std=-0.5, lr=-1),  # of experts as well
    "layers.*.feed_forward.router.weight": Rule(init_std=-0.5, lr=-1),
    "*norm.weight": Rule(init_std=0, lr=0),
}
"""Parameter name -> rule. Matrices from width to width begin and learn smaller in a wider model, all else does not.

Not in the table, because it is the same for all: Adam's eps is not scaled, and weight decay shrinks every parameter at
the rate of the schedule (`weight_decay_lr` of the optimizer).
"""


@dataclass(frozen=True, kw_only=True)
class MuP:
    """What muP adds to a model's function and to where and how fast it trains. Attention divides by the head width."""

    base_width: int = 256
    """The width at which nothing is scaled: where the learning rate was found."""
    embedding_multiplier: float = 1.0
    """Factor on what the embedding gives."""
    residual_multiplier: float = 1.0
    """Factor on what attention and feed-forward add to the residual stream."""

    def width_multiple(self, dim: int) -> float:
        """m_width; logits are divided by it."""
        return dim / self.base_width

    def init_std_factor(self, name: str, dim: int) -> float:
        return float(self.width_multiple(dim) ** rule_of(name).init_std)

    def lr_factor(self, name: str, dim: int) -> float:
        return float(self.width_multiple(dim) ** rule_of(name).lr)


def rule_of(name: str) -> Rule:
    """The first of RULES that fits. Raises ValueError for a parameter that nobody thought of."""
    for pattern, rule in RULES.items():
        if fnmatchcase(name, pattern):
            return rule
    raise ValueError(f"muP has no rule for the parameter {name}; add one to models/mup.py")


@dataclass(frozen=True, kw_only=True)
class MuPConfig:
    """[model.mup]: what is left out is the size's own, where it has muP, and else as said."""

    enabled: bool = True
    """False: the plain Llama, also of a size that has muP."""
    base_width: PositiveCount | None = None
    """The width (dim) at which nothing is scaled; 256."""
    embedding_multiplier: Multiplier | None = None
    """Factor on what the embedding gives; 1."""
    residual_multiplier: Multiplier | None = None
    """Factor on what attention and feed-forward add to the residual stream; 1."""

    def override(self, of_size: MuP | None) -> MuP | None:
        """Laid over that of a size."""
        if not self.enabled:
            return None
        below = of_size or MuP()
        return MuP(
            base_width=self.base_width or below.base_width,
            embedding_multiplier=self.embedding_multiplier or below.embedding_multiplier,
            residual_multiplier=self.residual_multiplier or below.residual_multiplier,
        )
