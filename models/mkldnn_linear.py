"""Linear layers with weights in oneDNN's memory layout, for fast generation on a CPU.

A step of generation reads every weight for only a few tokens. torch's plain product of so few rows reads at a fraction
of the memory bandwidth; with oneDNN's layout it takes half the time or less. torch.compile does the same with constant
weights. A model with such layers has no parameters to train or to save.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.moe import MoE

MIN_WEIGHTS = 2**17
"""Smallest number of weights of a matrix to replace. Smaller ones stay in the CPU cache, and the call costs more."""


class MkldnnLinear(nn.Module):
    """A linear layer, equal to nn.Linear up to the order of its sums. It has no gradient."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        super().__init__()
        self.constant_bias = None if bias_O is None else bias_O.detach()
        self.reordered_weight = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach())
        self.product = torch.ops.mkldnn._linear_pointwise.default

    def forward(self, x: Tensor, labels: None = None, tied_weight: Tensor | None = None) -> Tensor:
        """Return (..., O) for `x` (..., I). The other arguments are those of `LMHead`; a loss is not supported."""
        if labels is not None:
            raise ValueError("a model with MkldnnLinear layers returns logits only; call it without labels")
        y: Tensor = self.product(x, self.reordered_weight, self.constant_bias, "none", [], "")
        return y


def use_mkldnn_linear(model: nn.Module, tied_weight: Tensor) -> None:
    """Replace the large linear layers of `model`, in place. A layer without a weight uses `tied_weight`.

    Does nothing if the weights are not on the CPU, or oneDNN does not support them.
    """
    if tied_weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return
    if tied_weight.dtype == torch.bfloat16 and not has_bf16_kernels():
        return
    for parent in list(model.modules()):
        if isinstance(parent, MoE):  # reads the weight of its router directly, in float32
            continue
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear):
                weight = tied_weight if layer.weight is None else layer.weight
                if weight.numel() >= MIN_WEIGHTS:
                    setattr(parent, name, MkldnnLinear(weight, layer.bias))


def has_bf16_kernels() -> bool:
    """Return whether oneDNN supports bf16 on this CPU."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
