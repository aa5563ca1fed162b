"""Which precision a device is fast in."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["auto", "bf16", "float32"]


def resolve(precision: Precision, device: torch.device) -> Literal["bf16", "float32"]:
    """What `auto` means here: bf16 where the hardware multiplies matrices faster in it, float32 elsewhere.

    Decided by what the processor is, not by a timing, so that the same machine always trains in the same arithmetic.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bf16" if device.type == "cpu" and cpu_multiplies_bf16() else "float32"


def cpu_multiplies_bf16() -> bool:
    """Whether this processor has bf16 matrix instructions (AVX512-BF16, AMX). Emulated bf16 is several times slower."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, probe, bool)()) for probe in probes)


def dtype_of(precision: Literal["bf16", "float32"]) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32
