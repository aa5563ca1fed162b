"""Matrices in the order of bytes in which oneDNN multiplies few rows fastest: for generation on a CPU.

A step of generation reads every weight for the sake of a few tokens. torch's plain product of so few rows does that at
a fraction of the memory's speed; with a packed matrix it takes half the time or less. It is what torch.compile does
with constant weights, without the compiler. A packed model has no parameters left to train or to save.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.moe import MoE

SMALLEST = 2**17
"""Weights of a matrix below which it lies in the cache anyway, and the call costs more than the layout saves."""


class MkldnnLinear(nn.Module):
    """Computes what a linear layer without bias does, up to the order of its sums. No gradient."""

    def __init__(self, weight_OI: Tensor) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach())
        self.product = torch.ops.mkldnn._linear_pointwise.default

    def forward(self, x: Tensor, labels: None = None, tied_weight: Tensor | None = None) -> Tensor:
        """(..., I) to (..., O). A head's other arguments are those of `models.decoder.LMHead`; there is no loss."""
        if labels is not None:
            raise ValueError("a packed model gives logits, no loss")
        y: Tensor = self.product(x, self.packed, None, "none", [], "")
        return y


def use_mkldnn_linear(model: nn.Module, tied_weight: Tensor) -> None:
    """Replace the large linear layers of `model`, in place; one that has no weight of its own has `tied_weight`.

    Does nothing where there is no oneDNN for these weights, or they are not on the CPU.
    """
    if tied_weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return
    if tied_weight.dtype == torch.bfloat16 and not has_bf16_kernels():
        return
    for parent in list(model.modules()):
        if isinstance(parent, MoE):  # it reads the weight of its router itself, in float32
            continue
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and layer.bias is None:
                weight = tied_weight if layer.weight is None else layer.weight
                if weight.numel() >= SMALLEST:
                    setattr(parent, name, MkldnnLinear(weight))


def has_bf16_kernels() -> bool:
    """Whether oneDNN takes bf16 on this processor; where not, packing fails and torch's plain product does not."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
