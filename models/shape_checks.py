"""Checks of a `LlamaShape`: numbers that do not fit together, and variants that cannot be combined."""

from __future__ import annotations

import math

from components.errors import InputError
from models.presets import LlamaShape


def check_shape(shape: LlamaShape) -> None:
    """Raise InputError at the first key of `shape` with a value that cannot be, with a remedy."""
    _check_heads(shape)
    _check_numbers(shape)
    _check_attention(shape)
    if shape.experts and not 1 <= shape.top_k <= shape.experts:
        given = f"{shape.top_k} of {shape.experts} experts" if shape.top_k else "required with experts"
        raise InputError("top_k", f"{given}; use 1 to {shape.experts}")
    if shape.scaled_embeddings and shape.mup is not None:
        raise InputError(
            "scaled_embeddings",
            "a factor of sqrt(dim) changes with the width, which muP excludes; use mup.embedding_multiplier",
        )


def _check_heads(shape: LlamaShape) -> None:
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


def _check_numbers(shape: LlamaShape) -> None:
    for key in ("norm_eps", "rope_theta"):
        if not getattr(shape, key) > 0:
            raise InputError(key, f"{getattr(shape, key)} must be above 0")
    for key in ("attention_scale", "attention_softcap", "logit_softcap", "rope_local_theta"):
        if not 0 <= getattr(shape, key) < math.inf:
            raise InputError(key, f"{getattr(shape, key)} must be a finite number of at least 0, which disables it")
    if shape.rope_scaling is not None and shape.rope_scaling.type == "yarn" and shape.rope_theta <= 1:
        raise InputError("rope_theta", f"{shape.rope_theta} must be above 1 with YaRN")
    if not 0 < shape.partial_rotary_factor <= 1:
        raise InputError("partial_rotary_factor", f"{shape.partial_rotary_factor} must be above 0 and at most 1")
    if (width := shape.rotary_width) % 2 or not width:
        even = max(width + width % 2, 2)
        raise InputError(
            "partial_rotary_factor",
            f"{width} of {shape.head_width} channels cannot be turned in pairs; use {even / shape.head_width!r}, "
            f"which is {even}",
        )


def _check_attention(shape: LlamaShape) -> None:
    for key in ("global_attention_interval", "rope_local_theta"):
        if getattr(shape, key) and not shape.sliding_window:
            raise InputError(key, f"has no effect without a window; set sliding_window, or {key} = 0")
    if shape.global_attention_interval == 1:
        raise InputError(
            "global_attention_interval", "1 makes every layer global; use at least 2, or sliding_window = 0"
        )
    if shape.no_rope_interval == 1:
        raise InputError("no_rope_interval", "1 leaves no layer with rotary embedding; use at least 2")


def _nearest_divisor(number: int, wish: int) -> int:
    """Return the divisor of `number` closest to `wish`."""
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - wish))
