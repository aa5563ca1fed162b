"""Operations that selective activation checkpointing keeps the results of: costly to compute again, or small.

Used by the run and by its memory estimate. Imports nothing of the project.
"""

from __future__ import annotations

from typing import Any

_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "grouped_mm", "mm_float32"}
_ATTENTION = ("_scaled_dot_product", "flex_attention")
_ROUTING = {"sort", "topk"}
"""On a GPU a sort of an expert's tokens is many launches, and its result is small."""


def is_costly(operation: Any) -> bool:
    """Whether `operation`, an overload or higher-order operator of torch, is a matrix product, attention or routing."""
    name = operation_name(operation)
    return name in _PRODUCTS | _ROUTING or name.startswith(_ATTENTION)


def operation_name(operation: Any) -> str:
    """`mm` of `aten.mm.default`, `flex_attention` of the operator of that name."""
    return str(getattr(operation, "_opname", None) or getattr(operation, "_name", ""))
