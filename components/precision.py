"""Mixed precision: the precision of a device, and bf16 copies of the weights for a single device.

The parameters stay float32; the optimizer updates them, and checkpoints contain them. Forward and backward use bf16
copies, made once per step, so that activations, norms and the residual stream are bf16 too, as with FSDP2 on several
devices. Autocast over float32 parameters would cast each weight in every forward, and keep the residual stream in
float32. Gradients of the copies are bf16, and are accumulated in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

Precision = Literal["auto", "bf16", "float32"]


def resolve_precision(precision: Precision, device: torch.device) -> Literal["bf16", "float32"]:
    """Return the precision that `auto` selects: bf16 where the hardware has fast bf16 matrix products, else float32.

    It depends on the hardware's features, not on a measurement, so that a machine always trains in the same precision.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bf16" if device.type == "cpu" and cpu_has_bf16() else "float32"


def cpu_has_bf16() -> bool:
    """Return whether this CPU has bf16 matrix instructions (AVX512-BF16, AMX). Emulation is several times slower."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, probe, bool)()) for probe in probes)


def dtype_of(precision: Literal["bf16", "float32"]) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32


class WorkingWeights:
    """Copies of the parameters of `model` in `dtype`, which replace them while the context is active."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        """`model` is already materialized. Parameters that modules share stay shared."""
        copies: dict[int, nn.Parameter] = {}
        self.masters: list[Tensor] = []
        self.copies: list[Tensor] = []
        """One for each of `masters`, in the same order. Backward computes gradients of these."""
        self._places: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []
        for module in model.modules():
            for name, master in module.named_parameters(recurse=False):
                if id(master) not in copies:
                    copy = nn.Parameter(torch.empty_like(master, dtype=dtype), requires_grad=master.requires_grad)
                    copies[id(master)] = copy
                    self.masters.append(master)
                    self.copies.append(copy)
                    if copy.requires_grad:
                        copy.register_post_accumulate_grad_hook(_AccumulateInto(master))
                self._places.append((module, name, master, copies[id(master)]))

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Run forward and backward inside this context with copies of the current parameters.

        Backward must be inside too, because activation checkpointing recomputes the forward there. Gradients are added
        to those of the float32 parameters.
        """
        with torch.no_grad():
            # one launch for many tensors; it moves 6 bytes per parameter
            torch._foreach_copy_(self.copies, self.masters)
        for module, name, _, copy in self._places:
            module._parameters[name] = copy
        try:
            yield
        finally:
            for module, name, master, copy in self._places:
                module._parameters[name] = master
                copy.grad = None


class _AccumulateInto:
    """A hook that adds the gradient of a copy to that of the float32 parameter, and frees it."""

    def __init__(self, master: nn.Parameter) -> None:
        self.master = master

    def __call__(self, copy: Tensor) -> None:
        gradient, copy.grad = copy.grad, None
        if gradient is None:
            return
        if self.master.grad is None:
            self.master.grad = gradient.to(self.master.dtype)
        else:
            self.master.grad.add_(gradient)
