"""`[model] use = "models.llama:Llama"`: a Llama by name of its size, with any number of it overridden."""

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
    """The row of models/presets.py to start from."""
    dim: PositiveCount | None = None
    """Width of the residual stream."""
    layers: PositiveCount | None = None
    """Number of transformer blocks."""
    heads: PositiveCount | None = None
    """Query heads of a block."""
    kv_heads: PositiveCount | None = None
    """Key-value heads of a block; must divide `heads`, and is shared by heads / kv_heads of them."""
    head_dim: PositiveCount | None = None
    """Channels of one head, even; dim / heads unless given."""
    ffn_dim: PositiveCount | None = None
    """Width of the feed-forward's hidden layer; of each expert's, if there are experts."""
    experts: Count | None = None
    """Feed-forwards of a block, of which every token is sent to `top_k`; 0: one for all tokens."""
    top_k: PositiveCount | None = None
    """Experts of a token."""
    norm_eps: float | None = None
    """Added to the mean square in RMSNorm."""
    rope_theta: float | None = None
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Llama 3's scaling of the rotary frequencies; { factor = 1 } switches off what the size has."""
    tied_embeddings: bool | None = None
    """Whether the output projection is the embedding matrix."""
    max_sequence_length: PositiveCount | None = None
    """Longest sequence the model accepts, in tokens."""
    vocab_size: PositiveCount | None = None
    """Rows of the embedding; the tokenizer's vocabulary unless given. Larger pads it, say to a multiple of 128."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""
    depth_scaled_init: bool = True
    """Divide it by sqrt(2 * layers) for the matrices that write into the residual stream, wo and w_down."""
    mup: MuPConfig | None = None
    """Maximal update parametrisation: one learning rate for every width. Unset: as the size has it, most do not."""
    router: RouterLossConfig | None = None
    """What routers are trained for besides the loss of the tokens."""

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
            given = f"{shape.top_k} of {shape.experts} experts" if shape.top_k else "experts need it"
            raise InputError("top_k", f"{given}; take 1 to {shape.experts}")
        for key in ("top_k", "router"):
            if getattr(self, key) is not None and not shape.experts:
                raise InputError(key, f"this model has no experts; set experts, or leave {key} out")
        for key, value in {
            "norm_eps": shape.norm_eps,
            "rope_theta": shape.rope_theta,
            "init_std": self.init_std,
        }.items():
            if not value > 0:
                raise InputError(key, f"{value} must be above 0")

    @property
    def resolved_shape(self) -> LlamaShape:
        """The size after overrides."""
        row = PRESETS[self.size]
        mup = row.mup if self.mup is None else self.mup.override(row.mup)
        overrides = {field.name: getattr(self, field.name) for field in fields(LlamaShape) if field.name != "mup"}
        return replace(row, mup=mup, **{key: value for key, value in overrides.items() if value is not None})

    def plan(self, *, tp: int) -> ParallelPlan:
        """How the decoder is divided among processes. Raises ValueError if `tp` ranks cannot share its heads."""
        shape = self.resolved_shape
        if shape.kv_heads % tp:
            raise InputError("kv_heads", f"{shape.kv_heads} cannot be divided among parallel.tp = {tp} ranks")
        if not shape.experts and shape.ffn_dim % tp:
            raise InputError("ffn_dim", f"{shape.ffn_dim} cannot be divided among parallel.tp = {tp} ranks")
        return llama_parallel_plan(shape.layers, tied=shape.tied_embeddings, experts=bool(shape.experts))

    def build(self, *, vocab_size: int, sequence_length: int) -> Decoder:
        """The decoder on the current device, with weights still to be set by `init_weights(seed)` or a checkpoint.

        `vocab_size`: ids of the tokenizer. `sequence_length`: tokens of a training sequence.
        """
        shape = self.resolved_shape
        if self.vocab_size is not None and self.vocab_size < vocab_size:
            raise InputError(
                "vocab_size",
                f"{self.vocab_size} is too small for the tokenizer's {vocab_size} ids; "
                f"use at least {vocab_size}, or leave it out",
            )
        if sequence_length > shape.max_sequence_length:
            raise InputError(
                "max_sequence_length",
                f"{shape.max_sequence_length} is below the training.sequence_length of "
                f"{sequence_length}; raise the one or lower the other",
            )
        from models.decoder import Decoder  # brings torch's compiler along, which reading a recipe does not need

        return Decoder(
            shape,
            self.vocab_size or vocab_size,
            init_std=self.init_std,
            depth_scaled_init=self.depth_scaled_init,
            router=self.router,
        )


def _nearest_divisor(number: int, wish: int) -> int:
    """The divisor of `number` closest to `wish`."""
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - wish))
