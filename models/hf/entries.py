"""Entries of a `config.json`, which may be damaged or malicious: read within bounds, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LIMITS = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "moe_intermediate_size": 2**22,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "head_dim": 2**16,
    "query_pre_attn_scalar": 2**16,
    "max_position_embeddings": 2**31,
    "original_max_position_embeddings": 2**31,
    "sliding_window": 2**31,
    "sliding_window_pattern": 2**12,
    "num_local_experts": 2**12,
    "num_experts": 2**12,
    "num_experts_per_tok": 2**12,
}
"""Largest accepted value of each entry, which bounds what a file can make us allocate."""


def read_count(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """Return an integer from 1 to the limit of this entry. Raises ValueError."""
    value = config.get(name)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"{name} is missing from config.json")
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LIMITS[name]:
        raise ValueError(f"{name} = {str(value)[:40]} is not an integer from 1 to {_LIMITS[name]:,}")
    return value


def read_number(config: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """Return a number above 0. Raises ValueError."""
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e30:
        raise ValueError(f"{name} = {str(value)[:40]} is not a number above 0")
    return float(value)


def read_softcap(config: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """Return a bound of logits; 0 if the entry is null, which is none. Raises ValueError."""
    if (name in config and config[name] is None) or (name not in config and default is None):
        return 0.0
    return read_number(config, name, default)


def refuse_other_values(config: Mapping[str, Any], expected: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise ValueError for an entry of `expected` whose value is none of those named there; the first is ours."""
    for name, values in expected.items():
        value = config.get(name)
        if isinstance(value, (dict, list)) and not value:
            value = None
        if value not in values:
            raise ValueError(f"{name} = {repr(config.get(name))[:60]} is not supported; the decoder has {values[0]!r}")
