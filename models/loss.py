"""Cross-entropy of a linear head, a chunk of tokens at a time.

The logits of a micro-batch are its largest tensor: 8 sequences of 4,096 tokens over 128,256 words are 16.8 GB in
float32, and their gradient as much again. Here one chunk of them exists at a time, and while it does its gradient is
taken too: softmax minus one-hot needs nothing from backward. Three matrix products per chunk, as in the plain loss.

N tokens, n tokens of one chunk, D model width, V vocabulary
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100
"""The label of a token without target: no loss, no gradient (the convention of torch)."""


class AcrossVocabulary(Protocol):
    """Reductions over the processes that hold the other rows of the vocabulary, in place."""

    def maximum(self, tensor: Tensor) -> Tensor: ...
    def sum(self, tensor: Tensor) -> Tensor: ...


def default_chunk(device_type: str) -> int:
    """Tokens whose logits exist at one time."""
    # CPU: 256 tokens were best or within 3 % of it for every vocabulary of 2,048 to 32,000 (128 to 2,048 measured).
    return 256 if device_type == "cpu" else 2048


def working_bytes(tokens: int, vocab_size: int, dim: int, *, element_bytes: int, device_type: str) -> int:
    """The most memory `linear_cross_entropy` holds at once, beyond its arguments; `element_bytes`: of the products.

    The gradients of its two inputs, and the larger of two moments in a chunk: its logits and log-probabilities beside
    those of the chunk before, or, where products are not exact, its share of the weight's gradient.
    """
    exact = element_bytes >= 4
    rows = min(tokens, default_chunk(device_type))
    before = 0 if rows == tokens else 4 if exact else 6
    logits = rows * vocab_size * ((8 if exact else 10) + before)
    share = 0 if exact else vocab_size * (rows * 6 + dim * element_bytes)
    return tokens * dim * element_bytes + vocab_size * dim * 4 + max(logits, share)


@torch.compiler.disable  # the gradients that forward leaves on the context are more than the compiler traces
def linear_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    chunk_tokens: int | None = None,
    first: int = 0,
    across: AcrossVocabulary | None = None,
) -> Tensor:
    """Sum over tokens of -log softmax(x @ weight.T)[label]: (), float32 (float64 for float64 inputs).

    Under autocast the matrix products run in the autocast dtype; softmax, loss and the sum over chunks of the weight's
    gradient stay in float32. `chunk_tokens` is n; by default large enough to keep the device busy, and no larger.

    A process may hold only some rows of the vocabulary, from number `first` on; `across` reduces over those that hold
    the others. The loss is then equal on all of them, the gradient of the weight is that of these rows, and the
    gradients of `x_ND` have yet to be added up over the processes.

    Differentiable once, in `x_ND` and `weight_VD`; a second backward through the same call raises RuntimeError.
    """
    chunk_tokens = chunk_tokens or default_chunk(x_ND.device.type)
    with_gradients = torch.is_grad_enabled() and (x_ND.requires_grad or weight_VD.requires_grad)
    loss: Tensor = _LinearCrossEntropy.apply(x_ND, weight_VD, labels_N, chunk_tokens, with_gradients, first, across)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """Takes the gradients in forward, for an upstream gradient of 1; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        chunk: int,
        gradients: bool,
        first: int,
        across: AcrossVocabulary | None,
    ) -> Tensor:
        device = x_ND.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x_ND.dtype
        exact = torch.promote_types(dtype, torch.float32)
        x_ND, weight_VD = x_ND.to(dtype), weight_VD.to(dtype)
        loss = x_ND.new_zeros((), dtype=exact)
        d_x_ND = torch.empty_like(x_ND) if gradients else None
        d_weight_VD = torch.zeros_like(weight_VD, dtype=exact) if gradients else None

        for start in range(0, len(x_ND), chunk):
            x_nD, labels_n = x_ND[start : start + chunk], labels_N[start : start + chunk]
            log_p_nV = _log_softmax(x_nD @ weight_VD.T, exact, across)
            counted_n1 = (labels_n != IGNORE).unsqueeze(-1)
            row_n1 = labels_n.masked_fill(labels_n == IGNORE, first).unsqueeze(-1) - first
            here_n1 = counted_n1
            if across is not None:  # the label may be another process's row
                here_n1 = counted_n1 & (row_n1 >= 0) & (row_n1 < len(weight_VD))
                row_n1 = row_n1.clamp(0, len(weight_VD) - 1)
            loss -= log_p_nV.gather(-1, row_n1).masked_fill_(~here_n1, 0).sum()
            if d_x_ND is None or d_weight_VD is None:
                continue

            # d_logits = softmax - one_hot; ignored rows are zeroed in the tensors of width D, where it costs little.
            d_logits_nV = log_p_nV.exp_().scatter_add_(-1, row_n1, -here_n1.to(exact)).to(dtype)
            torch.mm(d_logits_nV, weight_VD, out=d_x_ND[start : start + chunk]).mul_(counted_n1)
            if dtype == exact:
                d_weight_VD.addmm_(d_logits_nV.T, x_nD * counted_n1)
            else:
                d_weight_VD += d_logits_nV.T @ (x_nD * counted_n1)

        ctx.gradients = (d_x_ND, d_weight_VD)
        return loss if across is None else across.sum(loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy: its gradients were already handed out; call it again")
        # Scaled in place and handed out: they are too large for a second copy.
        (d_x_ND, d_weight_VD), ctx.gradients = ctx.gradients, None
        return d_x_ND.mul_(d_loss), d_weight_VD.mul_(d_loss), None, None, None, None, None


def _log_softmax(logits_nV: Tensor, dtype: torch.dtype, across: AcrossVocabulary | None) -> Tensor:
    """Of these columns, normalised over all that there are."""
    if across is None:
        return F.log_softmax(logits_nV, -1, dtype=dtype)
    logits_nV = logits_nV.to(dtype)
    logits_nV = logits_nV - across.maximum(logits_nV.amax(-1, keepdim=True))
    return logits_nV.sub_(across.sum(logits_nV.exp().sum(-1, keepdim=True)).log_())
