"""`[model] use = "models.llama:Llama"`: a Llama preset, of which any number can be overridden."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from components.errors import InputError
from components.units import Count, PositiveCount
from models.mup import MuPConfig
from models.parallel_plan import ParallelPlan, llama_parallel_plan
from models.presets import PRESETS, Activation, LlamaShape, NormPlacement, PresetName, QKNorm
from models.rope import RopeScaling
from models.router_loss import RouterLossConfig
from models.shape_checks import check_shape

if TYPE_CHECKING:
    from models.decoder import Decoder

NonNegative = Annotated[float, Field(ge=0)]


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
    """Scaling of the rotary frequencies; { factor = 1 } disables that of the preset."""
    tied_embeddings: bool | None = None
    """Whether the output projection is the embedding matrix."""
    max_sequence_length: PositiveCount | None = None
    """Longest sequence the model accepts, in tokens."""
    activation: Activation | None = None
    """Activation of the gated feed-forward: "silu" (SwiGLU), or "gelu_tanh" (GeGLU, Gemma)."""
    norm_placement: NormPlacement | None = None
    """Norms before attention and feed-forward ("pre", Llama), after them ("post", OLMo 2), or "both" (Gemma 2)."""
    zero_centered_norm: bool | None = None
    """Gains of norms are 1 + weight (Gemma); weight decay, where it includes norms, pulls them to one."""
    scaled_embeddings: bool | None = None
    """Multiply embeddings by sqrt(dim) (Gemma)."""
    qkv_bias: bool | None = None
    """Biases of queries, keys and values (Qwen 2)."""
    qk_norm: QKNorm | None = None
    """RMSNorm of queries and keys: "per_head" before rotary embedding (Qwen 3, Gemma 3) or "per_head_after_rope"
    (Hunyuan), or over "all_heads" together (OLMo 2); "off": no norm."""
    gated_attention: bool | None = None
    """Multiply the attention output by a sigmoid of a linear function of the input (arXiv 2505.06708)."""
    attention_scale: float | None = None
    """Factor on attention logits; 0: 1 / sqrt(head_dim), and 1 / head_dim with muP."""
    attention_softcap: float | None = None
    """Bound attention logits by cap * tanh(logit / cap) (Gemma 2: 50); 0: unbounded."""
    logit_softcap: float | None = None
    """Bound output logits in the same way (Gemma 2: 30); 0: unbounded."""
    sliding_window: Count | None = None
    """Tokens that a token attends to, itself included; 0: all before it."""
    global_attention_interval: Count | None = None
    """Every n-th layer attends to all tokens, without the window (Gemma 3: 6, OLMo 3: 4, Gemma 2: 2); 0: none."""
    partial_rotary_factor: float | None = None
    """Fraction of the channels of a head that rotate, the first ones."""
    rope_local_theta: float | None = None
    """rope_theta of the layers with a window, which then have no rope_scaling; 0: those of the other layers."""
    no_rope_interval: Count | None = None
    """Every n-th layer has no rotary embedding (NoPE, arXiv 2501.18795; SmolLM 3: 4); 0: none."""
    vocab_size: PositiveCount | None = None
    """Rows of the embedding; unset: the tokenizer's vocabulary. A larger number pads it, as to a multiple of 128;
    a smaller one may only leave out special tokens of a tokenizer.json that no text is encoded to."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""
    depth_scaled_init: bool = True
    """Divide init_std by sqrt(2 * layers) for the matrices that write into the residual stream, wo and w_down."""
    mup: MuPConfig | None = None
    """Maximal update parametrization: one learning rate for every width. Unset: that of the preset, if it has one."""
    z_loss_coefficient: NonNegative = 0.0
    """Coefficient of the squared log-partition of the output logits, which keeps them from drifting (PaLM: 1e-4)."""
    router: RouterLossConfig | None = None
    """Auxiliary losses of the routers, with experts."""

    def __post_init__(self) -> None:
        check_shape(self.resolved_shape)
        for key in ("top_k", "router"):
            if getattr(self, key) is not None and not self.resolved_shape.experts:
                raise InputError(key, f"has no effect without experts; set experts, or remove {key}")
        mup = self.resolved_shape.mup
        if self.mup is not None and self.mup.base_layers is not None and (mup is None or mup.depth == "off"):
            raise InputError("mup", 'base_layers has no effect without depth = "completep"')
        if not self.init_std > 0:
            raise InputError("init_std", f"{self.init_std} must be above 0")

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
        return llama_parallel_plan(shape)

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
            z_loss_coefficient=self.z_loss_coefficient,
            router=self.router,
        )
