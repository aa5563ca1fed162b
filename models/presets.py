"""The shapes of the named models, with the source of every row.

The key of the same name in `[model]` overrides any number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from models.mup import MuP
from models.rope import RopeScaling

PresetName = Literal[
    "debug", "microllama300m", "tinyllama1b", "openllama3b", "llama3_1b", "llama3_3b", "llama3_8b",
    "powerlm12m", "powerlm36m", "powerlm121m", "powerlm1b", "powerlm3b", "powermoe1b", "powermoe3b",
    "qwen3_0.6b", "olmo2_1b", "gemma3_1b",
]  # fmt: skip

Activation = Literal["silu", "gelu_tanh"]
NormPlacement = Literal["pre", "post", "both"]
QKNorm = Literal["off", "per_head", "per_head_after_rope", "all_heads"]


@dataclass(frozen=True, kw_only=True)
class LlamaShape:
    """The shape of a Llama decoder: what defines its function, except the vocabulary. Lengths are in tokens."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    ffn_dim: int  # of each expert, with experts
    experts: int = 0  # 0: a dense feed-forward
    top_k: int = 0  # experts per token
    head_dim: int | None = None  # None: dim / heads, after overrides
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tied_embeddings: bool = False
    max_sequence_length: int = 2048
    mup: MuP | None = None  # its multipliers are part of the function

    # variants of Llama, described at the keys of models/llama.py; the defaults are Llama
    activation: Activation = "silu"
    norm_placement: NormPlacement = "pre"
    zero_centered_norm: bool = False
    scaled_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: QKNorm = "off"
    gated_attention: bool = False
    attention_scale: float = 0.0
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    sliding_window: int = 0
    global_attention_interval: int = 0
    partial_rotary_factor: float = 1.0
    rope_local_theta: float = 0.0
    no_rope_interval: int = 0

    @property
    def head_width(self) -> int:
        """C: number of channels of an attention head."""
        return self.head_dim if self.head_dim is not None else self.dim // self.heads

    @property
    def rotary_width(self) -> int:
        """Number of channels of an attention head that rotate."""
        return int(self.head_width * self.partial_rotary_factor + 1e-6)

    @property
    def residual_multiplier(self) -> float:
        """Factor on the outputs of attention and feed-forward."""
        return 1.0 if self.mup is None else self.mup.residual_factor(self.layers)

    def window_of(self, layer: int) -> int:
        """Return the number of tokens that `layer` (from 0) attends to, the current one included; 0: all before it."""
        return 0 if _every(self.global_attention_interval, layer) else self.sliding_window

    def rotates(self, layer: int) -> bool:
        """Return whether `layer` (from 0) has rotary embedding."""
        return not _every(self.no_rope_interval, layer)


def _every(interval: int, layer: int) -> bool:
    return interval > 0 and (layer + 1) % interval == 0


# debug has 1.2M parameters without embeddings. The next three are the models of Lau et al. 2024 (arXiv 2412.21124),
# from the public configurations (vocabulary 32,000); then Llama 3.2 1B, Llama 3.2 3B, Llama 3.1 8B (128,256). The next
# seven are the models of Shen et al. 2024 (arXiv 2408.13359; 49,152): three of the search, their 1B, PowerLM-3B; with
# experts, their 1B (1.3B parameters, 377M active) and PowerMoE-3B (3.3B, 800M active). The last three are Qwen3-0.6B
# (arXiv 2505.09388; 151,936), OLMo-2-0425-1B (arXiv 2501.00656; 100,352) and the text model of Gemma 3 1B
# (arXiv 2503.19786; 262,144), from their configurations.
_POWER: Any = {"tied_embeddings": True, "max_sequence_length": 4096}
_SEARCH = MuP(embedding_multiplier=12.0, residual_multiplier=0.26)
_MOE_1B = MuP(embedding_multiplier=12.0, residual_multiplier=0.28)
_LARGE = MuP(embedding_multiplier=12.0, residual_multiplier=0.22)
# fmt: off
PRESETS: dict[PresetName, LlamaShape] = {
    "debug":          LlamaShape(dim=128,  layers=6,  heads=4,  kv_heads=2,  ffn_dim=384),
    "microllama300m": LlamaShape(dim=1024, layers=12, heads=16, kv_heads=4,  ffn_dim=5632),
    "tinyllama1b":    LlamaShape(dim=2048, layers=22, heads=32, kv_heads=4,  ffn_dim=5632),
    "openllama3b":    LlamaShape(dim=3200, layers=26, heads=32, kv_heads=32, ffn_dim=8640, norm_eps=1e-6),
    "llama3_1b":      LlamaShape(dim=2048, layers=16, heads=32, kv_heads=8,  ffn_dim=8192,
                           rope_theta=500_000.0, rope_scaling=RopeScaling(factor=32.0),
                           tied_embeddings=True, max_sequence_length=131_072),
    "llama3_3b":      LlamaShape(dim=3072, layers=28, heads=24, kv_heads=8,  ffn_dim=8192,
                           rope_theta=500_000.0, rope_scaling=RopeScaling(factor=32.0),
                           tied_embeddings=True, max_sequence_length=131_072),
    "llama3_8b":      LlamaShape(dim=4096, layers=32, heads=32, kv_heads=8,  ffn_dim=14336,
                           rope_theta=500_000.0, rope_scaling=RopeScaling(factor=8.0), max_sequence_length=131_072),
    "powerlm12m":     LlamaShape(dim=128,  layers=32, heads=2,  kv_heads=2,  ffn_dim=320,  mup=_SEARCH, **_POWER),
    "powerlm36m":     LlamaShape(dim=256,  layers=32, heads=4,  kv_heads=4,  ffn_dim=640,  mup=_SEARCH, **_POWER),
    "powerlm121m":    LlamaShape(dim=512,  layers=32, heads=8,  kv_heads=8,  ffn_dim=1280, mup=_SEARCH, **_POWER),
    "powerlm1b":      LlamaShape(dim=1536, layers=40, heads=24, kv_heads=24, ffn_dim=4096, mup=_LARGE,  **_POWER),
    "powerlm3b":      LlamaShape(dim=2304, layers=40, heads=36, kv_heads=36, ffn_dim=9216, mup=_LARGE,  **_POWER),
    "powermoe1b":     LlamaShape(dim=1024, layers=24, heads=16, kv_heads=8,  ffn_dim=512,  mup=_MOE_1B, **_POWER,
                           experts=32, top_k=8),
    "powermoe3b":     LlamaShape(dim=1536, layers=32, heads=24, kv_heads=8,  ffn_dim=512,  mup=_LARGE,  **_POWER,
                           experts=40, top_k=8),
    "qwen3_0.6b":     LlamaShape(dim=1024, layers=28, heads=16, kv_heads=8,  ffn_dim=3072, head_dim=128, norm_eps=1e-6,
                           rope_theta=1_000_000.0, tied_embeddings=True, max_sequence_length=40_960,
                           qk_norm="per_head"),
    "olmo2_1b":       LlamaShape(dim=2048, layers=16, heads=16, kv_heads=16, ffn_dim=8192, norm_eps=1e-6,
                           rope_theta=500_000.0, max_sequence_length=4096,
                           norm_placement="post", qk_norm="all_heads"),
    "gemma3_1b":      LlamaShape(dim=1152, layers=26, heads=4,  kv_heads=1,  ffn_dim=6912, head_dim=256, norm_eps=1e-6,
                           rope_theta=1_000_000.0, tied_embeddings=True, max_sequence_length=32_768,
                           activation="gelu_tanh", norm_placement="both", zero_centered_norm=True,
                           scaled_embeddings=True, qk_norm="per_head",
                           sliding_window=512, global_attention_interval=6, rope_local_theta=10_000.0),
}
# fmt: on
