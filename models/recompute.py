"""Element-wise functions that the backward pass computes again instead of keeping their intermediate results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def recompute(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Return `function(*inputs)`, of which only the inputs are kept for the backward pass. The gradients are the same.

    In a compiled block it is a plain call: the compiler decides what to recompute.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return function(*inputs)
    result: Tensor = _Recompute.apply(function, *inputs)
    return result


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        inputs = [x.detach().requires_grad_(each) for x, each in zip(ctx.saved_tensors, needed, strict=True)]
        with torch.enable_grad():
            output = ctx.function(*inputs)
        gradients = iter(torch.autograd.grad(output, [x for x in inputs if x.requires_grad], d_output))
        return None, *(next(gradients) if each else None for each in needed)
