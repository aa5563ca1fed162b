"""Models of other sizes with the proportions of a recipe's: layers to width, heads, and feed-forward."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from models.llama import Llama
from recipes.config import Config
from recipes.model_setup import build_model

STRETCH_COST = 0.2
"""Layers and heads are whole numbers: a model that is wider or narrower for its depth than that of the recipe, by a
factor of e, is chosen only if its number of parameters is nearer by 20 %."""
SEARCHED = 4.0
"""Widths within this factor of the first guess, which leaves out the embedding, are tried."""
FFN_MULTIPLE = 8


@dataclass(frozen=True)
class Size:
    """One size of the model."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    ffn_dim: int
    parameters: int
    """All parameters."""
    multiplied: int
    """The parameters that a token is multiplied with: all but an input embedding that is not the output, too, and but
    the experts that a token is not routed to."""

    @property
    def settings(self) -> dict[str, str]:
        """The keys of the recipe."""
        return {f"model.{key}": str(getattr(self, key)) for key in ("dim", "layers", "heads", "kv_heads", "ffn_dim")}


@dataclass(frozen=True)
class Family:
    """The sizes that have about the proportions of the model of `config`; with experts, as many of them."""

    config: Config
    vocab_size: int
    _by_width: dict[int, tuple[Size, Size]] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(model := self.config.recipe.model, Llama):
            raise ValueError(
                "a plan changes the size of models.llama:Llama by dim, layers, heads, kv_heads and ffn_dim; this "
                f"recipe has {type(model).__name__}"
            )

    @cached_property
    def base(self) -> Size:
        """The size in the recipe."""
        shape = self.config.recipe.model.resolved_shape
        return self._counted(shape.dim, shape.layers, shape.heads, shape.kv_heads, shape.ffn_dim)

    def of(self, parameters: int) -> Size:
        """Return a size of about `parameters`, near to the proportions of the recipe.

        Raises ValueError if none is within a quarter.
        """
        aspect = self.base.dim / self.base.layers

        def distance(size: Size) -> float:
            stretch = abs(math.log(size.dim / size.layers / aspect))
            return abs(math.log(size.parameters / parameters)) + STRETCH_COST * stretch

        best = min(self._near(parameters, aspect), key=distance)
        if not 0.8 < best.parameters / parameters < 1.25:
            raise ValueError(
                f"no model of {parameters:,} parameters has about the proportions of the recipe's; the nearest has "
                f"{best.parameters:,}"
            )
        return best

    def build(self, size: Size) -> Any:
        """Return the model of a size on the meta device."""
        keys = {key.partition(".")[2]: int(value) for key, value in size.settings.items()}
        recipe = replace(self.config.recipe, model=replace(self.config.recipe.model, **keys))
        return build_model(replace(self.config, recipe=recipe), self.vocab_size)

    def flops_per_token(self, size: Size) -> float:
        return float(self.build(size).flops_per_token(self.config.recipe.training.sequence_length))

    def _near(self, parameters: int, aspect: float) -> Iterator[Size]:
        base = self.base
        one, two = self._one_and_two_layers(base.dim, base.heads, base.kv_heads, base.ffn_dim)
        per_layer = two.parameters - one.parameters
        guess = (parameters * aspect * base.dim**2 / per_layer) ** (1 / 3)  # layers x dim^2 x a constant
        tp = self.config.recipe.parallel.tp  # which divides the heads
        units = guess / base.dim * base.kv_heads / tp
        for unit in range(max(1, int(units / SEARCHED)), math.ceil(units * SEARCHED) + 1):
            kv_heads = unit * tp
            heads = base.heads // base.kv_heads * kv_heads
            dim = round(base.dim / base.heads * heads)
            ffn_dim = max(1, round(base.ffn_dim / base.dim * dim / FFN_MULTIPLE)) * FFN_MULTIPLE
            one, two = self._one_and_two_layers(dim, heads, kv_heads, ffn_dim)
            per_layer, per_token = two.parameters - one.parameters, two.multiplied - one.multiplied
            more = max(0, round((parameters - one.parameters) / per_layer))
            yield replace(
                one, layers=1 + more,
                parameters=one.parameters + more * per_layer, multiplied=one.multiplied + more * per_token,
            )  # fmt: skip

    def _one_and_two_layers(self, dim: int, heads: int, kv_heads: int, ffn_dim: int) -> tuple[Size, Size]:
        """Return the sizes with one layer and with two; each further one adds as much."""
        if dim not in self._by_width:
            one, two = (self._counted(dim, layers, heads, kv_heads, ffn_dim) for layers in (1, 2))
            self._by_width[dim] = one, two
        return self._by_width[dim]

    def _counted(self, dim: int, layers: int, heads: int, kv_heads: int, ffn_dim: int) -> Size:
        model = self.build(Size(dim, layers, heads, kv_heads, ffn_dim, 0, 0))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        tied = self.config.recipe.model.resolved_shape.tied_embeddings
        embedding = 0 if tied else model.tok_embeddings.weight.numel()
        return Size(dim, layers, heads, kv_heads, ffn_dim, parameters, parameters - embedding - model.idle_parameters())
