"""The variants of the decoder, one by one and in combinations that cover every pair of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

from models.presets import LlamaShape
from models.rope import RopeScaling

VARIANTS: dict[str, dict[str, Any]] = {
    "norms after": {"norm_placement": "post"},
    "norms before and after": {"norm_placement": "both"},
    "zero-centred norms": {"zero_centered_norm": True},
    "GeGLU": {"activation": "gelu_tanh"},
    "scaled embeddings": {"scaled_embeddings": True},
    "biases": {"qkv_bias": True},
    "norm of each head": {"qk_norm": "per_head"},
    "norm of each head after rotation": {"qk_norm": "per_head_after_rope"},
    "norm of all heads": {"qk_norm": "all_heads"},
    "gated attention": {"gated_attention": True},
    "attention scale": {"attention_scale": 0.31},
    "softcaps": {"attention_softcap": 1.5, "logit_softcap": 2.0},
    "window": {"sliding_window": 3},
    "window, with global layers": {"sliding_window": 4, "global_attention_interval": 2, "rope_local_theta": 100.0},
    "partial rotation": {"partial_rotary_factor": 0.5},
    "layers without rotation": {"no_rope_interval": 2},
    "YaRN": {"rope_scaling": RopeScaling(type="yarn", factor=4.0, original_max_position=16)},
}
"""Name -> fields of LlamaShape."""


def shape_with(shape: LlamaShape, *names: str) -> LlamaShape:
    """Return `shape` with these variants."""
    return replace(shape, **{key: value for name in names for key, value in VARIANTS[name].items()})


def combined_shapes(shape: LlamaShape) -> dict[str, LlamaShape]:
    """Return by name `shape` with combinations of variants in which every pair occurs that can be combined."""
    missing = {(one, other) for one, other in combinations(VARIANTS, 2) if _fit(one, other)}
    shapes: dict[str, LlamaShape] = {}
    while missing:
        names = set(min(missing))
        while more := [name for name in VARIANTS if name not in names and all(_fit(name, each) for each in names)]:
            names.add(max(more, key=lambda name: len(missing & _pairs({name, *names}))))
        missing -= _pairs(names)
        shapes[f"combination {len(shapes) + 1}"] = shape_with(shape, *names)
    return shapes


def _fit(one: str, other: str) -> bool:
    return not VARIANTS[one].keys() & VARIANTS[other].keys()


def _pairs(names: set[str]) -> set[tuple[str, str]]:
    return set(combinations([name for name in VARIANTS if name in names], 2))
