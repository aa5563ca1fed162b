"""Rotary embedding in `config.json`: `rope_parameters` of transformers 5 and older spellings, in both directions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from models.hf.entries import read_count, read_number
from models.presets import LlamaShape
from models.rope import RopeScaling

_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
FULL, SLIDING = "full_attention", "sliding_attention"


def rope_from_hf(config: Mapping[str, Any], *, theta: float = 10_000.0, local_theta: float = 0.0) -> dict[str, Any]:
    """Return rope_theta, rope_scaling (keys of `models.rope:RopeScaling` or None) and rope_local_theta.

    `theta` is the default of the architecture, and `local_theta` that of its layers with a window if these have a
    table of their own. Raises ValueError for an entry out of bounds and for an unsupported scaling.
    """
    table = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(table, Mapping):
        raise ValueError(f"rope_parameters: {table!r} is not a table")
    by_layer = FULL in table or SLIDING in table
    if config.get("rope_parameters") and config.get("rope_scaling"):
        # readers differ in which of the two they use; exports have both, and they agree
        older = config["rope_scaling"]
        newer = (table.get(FULL) or {}) if by_layer else table
        if not isinstance(older, Mapping) or any(newer.get(key) != value for key, value in older.items()):
            raise ValueError("rope_scaling and rope_parameters differ; remove one of them")
    if local_theta and config.get("rope_parameters") and not by_layer:
        raise ValueError(f"rope_parameters has no {FULL}, as this architecture requires")
    full = _rope_of_table(config, (table.get(FULL) or {}) if by_layer else table, theta)
    if not local_theta:
        if by_layer and _rope_of_table(config, table.get(SLIDING) or table.get(FULL) or {}, theta) != full:
            raise ValueError("rope_parameters: one table for all layers is supported; this one depends on the layer")
        return full | {"rope_local_theta": 0.0}
    # layers with a window: a table of their own, or the same one
    older = {"rope_theta": config.get("rope_local_base_freq") or local_theta}
    local = _rope_of_table({**config, **older}, (table.get(SLIDING) or {}) if by_layer else {}, local_theta)
    if local == full:
        return full | {"rope_local_theta": 0.0}
    if local["rope_scaling"] is not None:
        raise ValueError("rope_parameters: a scaling of the layers with a window is not supported")
    return full | {"rope_local_theta": local["rope_theta"]}


def _rope_of_table(config: Mapping[str, Any], table: Mapping[str, Any], theta: float) -> dict[str, Any]:
    if not isinstance(table, Mapping):
        raise ValueError(f"rope_parameters: {table!r} is not a table")
    theta = read_number({**config, **table}, "rope_theta", theta)
    kind = table.get("rope_type", table.get("type", "default"))
    if table.get("partial_rotary_factor") not in (1, None):
        raise ValueError(f"partial_rotary_factor = {table['partial_rotary_factor']}: no supported family has it")
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if not isinstance(kind, str) or kind not in _REQUIRED:
        raise ValueError(f'rope_type = {kind!r} is not supported; supported are "default", {", ".join(_REQUIRED)}')
    if missing := sorted(key for key in _REQUIRED[kind] if table.get(key) is None):
        raise ValueError(f"rope_parameters has no {', '.join(missing)}")
    scaling: dict[str, Any] = {"type": kind, "factor": read_number(table, "factor")}
    if kind == "llama3":
        scaling |= {key: read_number(table, key) for key in ("low_freq_factor", "high_freq_factor")}
    if kind == "yarn":
        scaling |= _yarn_of_table(table, theta)
    if kind != "linear":
        name = "original_max_position_embeddings"
        if config.get(name) not in (None, table.get(name)):
            raise ValueError(f"{name} differs from that of rope_parameters; remove one of them")
        scaling["original_max_position"] = (
            read_count(config, "max_position_embeddings", 2048) if kind == "dynamic" else read_count(table, name)
        )
    return {"rope_theta": theta, "rope_scaling": scaling}


def _yarn_of_table(table: Mapping[str, Any], theta: float) -> dict[str, float]:
    if theta <= 1:
        raise ValueError(f"rope_theta = {theta:g} must be above 1 with YaRN")
    if table.get("truncate") not in (True, None):
        raise ValueError(f"truncate = {table['truncate']!r} is not supported; YaRN's bounds are integers here")
    return {
        "beta_fast": read_number(table, "beta_fast", 32.0),
        "beta_slow": read_number(table, "beta_slow", 1.0),
        "attention_factor": _yarn_attention_factor(table),
    }


def _yarn_attention_factor(table: Mapping[str, Any]) -> float:
    if table.get("attention_factor") is not None:
        return read_number(table, "attention_factor")
    factor = read_number(table, "factor")

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    if table.get("mscale") and table.get("mscale_all_dim"):
        return magnitude(read_number(table, "mscale")) / magnitude(read_number(table, "mscale_all_dim"))
    return magnitude(1.0)


def rope_to_hf(shape: LlamaShape, *, by_layer: bool) -> dict[str, Any]:
    """Return the entries of rotary embedding, in the spelling of transformers 5 and in that of earlier versions, which
    most other readers have. `by_layer`: the architecture has a table for each kind of layer."""
    scaling = None if shape.rope_scaling is None else _scaling_to_hf(shape.rope_scaling)
    full = {"rope_type": "default", "rope_theta": shape.rope_theta, **(scaling or {})}
    older = {"rope_theta": shape.rope_theta, "rope_scaling": scaling}
    if not by_layer:
        return {"rope_parameters": full, **older}
    local = {"rope_type": "default", "rope_theta": shape.rope_local_theta} if shape.rope_local_theta else full
    return {"rope_parameters": {FULL: full, SLIDING: local}, **older, "rope_local_base_freq": local["rope_theta"]}


def max_position_to_hf(shape: LlamaShape) -> int:
    """Return `max_position_embeddings`; for dynamic scaling, that is the length from which on it scales."""
    scaling = shape.rope_scaling
    if scaling is not None and scaling.type == "dynamic":
        return scaling.original_max_position
    return shape.max_sequence_length


def max_sequence_length_from_hf(keys: Mapping[str, Any], max_position: int) -> int:
    """Return max_sequence_length for the keys of `rope_from_hf`."""
    scaling = keys["rope_scaling"]
    if scaling is not None and scaling["type"] == "dynamic":
        return int(max_position * scaling["factor"])
    return max_position


def _scaling_to_hf(scaling: RopeScaling) -> dict[str, Any]:
    entries: dict[str, Any] = {"rope_type": scaling.type, "factor": scaling.factor}
    if scaling.type == "llama3":
        entries |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.type == "yarn":
        entries |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        entries["attention_factor"] = scaling.table_factor
    if scaling.type in ("llama3", "yarn"):
        entries["original_max_position_embeddings"] = scaling.original_max_position
    return entries
