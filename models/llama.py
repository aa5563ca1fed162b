"""`[model] use = "models.llama:Llama"`: a Llama preset, of which any number can be overridden."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from components.errors import InputError
from components.units import Count, PositiveCount
from models.mup import MuPConfig
from models.parallel_plan import ParallelPlan, llama_parallel_plan
from models.presets import PRESETS, LlamaShape, PresetName
from models.rope import RopeScaling
from models.router_loss import RouterLossConfig

if TYPE_CHECKING:
    from models.decoder import Decoder


@dataclass(kw_only=True)
class Llama:
    """A Llama decoder. `size` names a row of models/presets.py; every other key overrides one number of that row."""

    size: PresetName = "debug"
    """Row of models/presets.py."""
    dim: PositiveCount | None = None
    """Width of the residual stream."""
    layers: PositiveCount | None = None
    """Number of transformer blocks."""
    heads: PositiveCount | None = None
    """Query heads of a block."""
    kv_heads: PositiveCount | None = None
    """Key-value heads of a block, each shared by heads / kv_heads query heads; must divide `heads`."""
    head_dim: PositiveCount | None = None
    """Channels of one head, an even number; unset: dim / heads."""
    ffn_dim: PositiveCount | None = None
    """Hidden width of the feed-forward; with experts, of each expert."""
    experts: Count | None = None
    """Number of experts of a block, of which every token uses `top_k`; 0: a dense feed-forward."""
    top_k: PositiveCount | None = None
    """Experts per token."""
    norm_eps: float | None = None
    """Added to the mean square in RMSNorm."""
    rope_theta: float | None = None
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Llama 3's scaling of the rotary frequencies; { factor = 1 } disables that of the preset."""
    tied_embeddings: bool | None = None
    """Whether the output projection is the embedding matrix."""
    max_sequence_length: PositiveCount | None = None
    """Longest sequence the model accepts, in tokens."""
    vocab_size: PositiveCount | None = None
    """Rows of the embedding; unset: the tokenizer's vocabulary. A larger number pads it, for example to a multiple of
    128."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""
    depth_scaled_init: bool = True
    """Divide init_std by sqrt(2 * layers) for the matrices that write into the residual stream, wo and w_down."""
    mup: MuPConfig | None = None
    """Maximal update parametrization: one learning rate for every width. Unset: that of the preset, if it has one."""
    router: RouterLossConfig | None = None
    """Auxiliary losses of the routers, with experts."""

    def __post_init__(self) -> None:
        shape = self.resolved_shape
        if shape.heads % shape.kv_heads:
            raise InputError(
                "kv_heads",
                f"{shape.kv_heads} does not divide the {shape.heads} heads; "
                f"use {_nearest_divisor(shape.heads, shape.kv_heads)}",
            )
        if shape.head_dim is None and shape.dim % shape.heads:
            raise InputError(
                "heads",
                f"{shape.heads} does not divide dim = {shape.dim}; "
                f"use {_nearest_divisor(shape.dim, shape.heads)}, or set head_dim",
            )
        if shape.head_width % 2:
            raise InputError(
                "head_dim",
                f"{shape.head_width} is odd, and rotary embedding turns channels in pairs; use {shape.head_width + 1}",
            )
        if shape.experts and not 1 <= shape.top_k <= shape.experts:
            given = f"{shape.top_k} of {shape.experts} experts" if shape.top_k else "required with experts"
            raise InputError("top_k", f"{given}; use 1 to {shape.experts}")
        for key in ("top_k", "router"):
            if getattr(self, key) is not None and not shape.experts:
                raise InputError(key, f"has no effect without experts; set experts, or remove {key}")
        for key, value in {
            "norm_eps": shape.norm_eps,
            "rope_theta": shape.rope_theta,
            "init_std": self.init_std,
        }.items():
            if not value > 0:
                raise InputError(key, f"{value} must be above 0")

    @property
    def resolved_shape(self) -> LlamaShape:
        """The shape of the preset with all overrides applied."""
        row = PRESETS[self.size]
        mup = row.mup if self.mup is None else self.mup.override(row.mup)
        overrides = {field.name: getattr(self, field.name) for field in fields(LlamaShape) if field.name != "mup"}
        return replace(row, mup=mup, **{key: value for key, value in overrides.items() if value is not None})

    def plan(self, *, tp: int) -> ParallelPlan:
        """Return how the decoder is parallelized. Raises InputError if `tp` does not divide its heads or ffn_dim."""
        shape = self.resolved_shape
        if shape.kv_heads % tp:
            raise InputError("kv_heads", f"{shape.kv_heads} cannot be divided among parallel.tp = {tp} ranks")
        if not shape.experts and shape.ffn_dim % tp:
            raise InputError("ffn_dim", f"{shape.ffn_dim} cannot be divided among parallel.tp = {tp} ranks")
        return llama_parallel_plan(shape.layers, tied=shape.tied_embeddings, experts=bool(shape.experts))

    def build(self, *, vocab_size: int, sequence_length: int) -> Decoder:
        """Return the decoder on the current device; its weights are set by `init_weights(seed)` or a checkpoint.

        `vocab_size` is that of the tokenizer, `sequence_length` the tokens of a training sequence.
        """
        shape = self.resolved_shape
        if self.vocab_size is not None and self.vocab_size < vocab_size:
            raise InputError(
                "vocab_size",
                f"{self.vocab_size} is too small for the tokenizer's {vocab_size} ids; "
                f"use at least {vocab_size}, or remove the key",
            )
        if sequence_length > shape.max_sequence_length:
            raise InputError(
                "max_sequence_length",
                f"{shape.max_sequence_length} is below training.sequence_length = {sequence_length}; raise it "
                "or lower training.sequence_length",
            )
        from models.decoder import Decoder  # imports torch's compiler, which reading a recipe does not need

        return Decoder(
            shape,
            self.vocab_size or vocab_size,
            init_std=self.init_std,
            depth_scaled_init=self.depth_scaled_init,
            router=self.router,
        )


def _nearest_divisor(number: int, wish: int) -> int:
    """Return the divisor of `number` closest to `wish`."""
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - wish))
