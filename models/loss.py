"""Cross-entropy of a linear head, computed in chunks of tokens.

The logits of a micro-batch are its largest tensor: 8 sequences of 4,096 tokens with a vocabulary of 128,256 are 16.8 GB
in float32, and their gradient is as large. Here the logits of one chunk exist at a time, and their gradient, softmax
minus one-hot, is computed in the forward pass, because it needs nothing from backward. That takes three matrix products
per chunk, as many as the plain loss.

N tokens, n tokens of one chunk, D model width, V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from components.token_ids import IGNORE_INDEX
from models.z_loss import ZLoss


class VocabReduce(Protocol):
    """In-place reductions over the processes that hold the other rows of the vocabulary."""

    def all_reduce_max(self, tensor: Tensor) -> Tensor: ...
    def all_reduce_sum(self, tensor: Tensor) -> Tensor: ...


def default_chunk(device_type: str, vocab_size: int) -> int:
    """Return the tokens per chunk."""
    # CPU: of 128 to 2,048 tokens, 256 was within 3 % of the best for every vocabulary from 2,048 to 32,000.
    # CUDA: larger chunks are slightly faster, but with a vocabulary of 128,256, 4,096 tokens are 1 GB of bf16 logits.
    if device_type == "cpu":
        return 256
    return 4096 if vocab_size <= 2**16 else 2048


def working_bytes(
    tokens: int,
    vocab_size: int,
    dim: int,
    *,
    element_bytes: int,
    device_type: str,
    compiled: bool = False,
    softcap: bool = False,
) -> int:
    """Return the peak memory of `chunked_cross_entropy` in bytes, without its arguments.

    It is the gradients of both inputs and the larger of two peaks within a chunk: logits and log-probabilities, and the
    bounded logits with a softcap
    (compiled: bf16 logits and their gradient), or the chunk's contribution to the weight gradient, where that is not
    accumulated in place. `element_bytes` is the size of an element of the matrix products.
    """
    exact = element_bytes >= 4
    rows = min(tokens, default_chunk(device_type, vocab_size))
    logits = rows * vocab_size * (4 if compiled else (8 if exact else 10) + softcap * (4 if exact else 2))
    weight_grad = 0 if exact or device_type == "cuda" else vocab_size * (rows * 6 + dim * element_bytes)
    return tokens * dim * element_bytes + vocab_size * dim * 4 + max(logits, weight_grad)


@torch.compiler.disable  # the compiler cannot trace gradients that forward stores on the context
def chunked_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    chunk_tokens: int | None = None,
    vocab_start: int = 0,
    vocab_reduce: VocabReduce | None = None,
    compiled: bool = False,
    softcap: float = 0.0,
    z_loss: ZLoss | None = None,
) -> Tensor:
    """Return the sum over tokens of -log softmax(x @ weight.T)[label], () float32 (float64 for float64 inputs).

    With `softcap`, the logits z are cap * tanh(z / cap). The gradient includes that of `z_loss`; the value does not.

    Under autocast the matrix products run in the autocast dtype; softmax, loss and the sum over chunks of the weight
    gradient are in float32. `chunk_tokens` is n; see `default_chunk`. `compiled` fuses the element-wise operations on
    the logits of a chunk into one kernel with torch.compile.

    With `vocab_reduce`, this process holds only some rows of the vocabulary, from `vocab_start` on. The loss is then
    equal on all processes, the gradient of `weight_VD` is that of these rows, and the gradient of `x_ND` is a partial
    sum, which the caller adds up over the processes.

    Differentiable once in `x_ND` and `weight_VD`; a second backward through the same call raises RuntimeError.
    """
    chunk_tokens = chunk_tokens or default_chunk(x_ND.device.type, len(weight_VD))
    with_gradients = torch.is_grad_enabled() and (x_ND.requires_grad or weight_VD.requires_grad)
    loss: Tensor = _LinearCrossEntropy.apply(
        x_ND,
        weight_VD,
        labels_N,
        chunk_tokens,
        with_gradients,
        vocab_start,
        vocab_reduce,
        compiled and vocab_reduce is None,
        softcap,
        z_loss,
    )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients in forward, for an upstream gradient of 1; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        chunk: int,
        gradients: bool,
        vocab_start: int,
        vocab_reduce: VocabReduce | None,
        compiled: bool,
        softcap: float,
        z_loss: ZLoss | None,
    ) -> Tensor:
        device = x_ND.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x_ND.dtype
        exact = torch.promote_types(dtype, torch.float32)
        x_ND, weight_VD = x_ND.to(dtype), weight_VD.to(dtype)
        loss = x_ND.new_zeros((), dtype=exact)
        d_x_ND = torch.empty_like(x_ND) if gradients else None
        d_weight_VD = torch.zeros_like(weight_VD, dtype=exact) if gradients else None
        z_coefficient = 0.0 if z_loss is None else z_loss.coefficient

        for start in range(0, len(x_ND), chunk):
            x_nD, labels_n = x_ND[start : start + chunk], labels_N[start : start + chunk]
            logits_nV = x_nD @ weight_VD.T  # in the dtype of the products
            d_logits_nV: Tensor | None
            if compiled:
                chunk_loss, log_sum_n1, d_logits_nV = _compiled_loss()(logits_nV, labels_n, softcap, z_coefficient)
            else:
                chunk_loss, log_sum_n1, d_logits_nV = _loss_of_chunk(
                    logits_nV, labels_n, exact, vocab_start, vocab_reduce, gradients, softcap, z_coefficient
                )
            del logits_nV  # free it before the products below allocate
            loss += chunk_loss
            if z_loss is not None:
                z_loss.accumulate(log_sum_n1.squeeze(-1), labels_n != IGNORE_INDEX)
            if d_x_ND is None or d_weight_VD is None or d_logits_nV is None:
                continue

            # zero the rows of ignored labels in the tensors of width D, which are much smaller than those of width V
            counted_n1 = (labels_n != IGNORE_INDEX).unsqueeze(-1)
            # (n, V) @ (V, D), written into the rows of this chunk
            torch.mm(d_logits_nV, weight_VD, out=d_x_ND[start : start + chunk]).mul_(counted_n1)
            x_nD = x_nD * counted_n1
            if dtype == exact:
                d_weight_VD.addmm_(d_logits_nV.T, x_nD)  # += (V, n) @ (n, D)
            elif device == "cuda":  # bf16 product accumulated into the float32 sum, without rounding in between
                torch.addmm(d_weight_VD, d_logits_nV.T, x_nD, out_dtype=exact, out=d_weight_VD)
            else:
                d_weight_VD += d_logits_nV.T @ x_nD
            del d_logits_nV

        ctx.gradients = (d_x_ND, d_weight_VD)
        return loss if vocab_reduce is None else vocab_reduce.all_reduce_sum(loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("chunked_cross_entropy: backward can run only once; call the loss again")
        # Scaled in place and returned without a copy, because they are large.
        (d_x_ND, d_weight_VD), ctx.gradients = ctx.gradients, None
        return d_x_ND.mul_(d_loss), d_weight_VD.mul_(d_loss), None, None, None, None, None, None, None, None


def _loss_of_chunk(
    logits_nV: Tensor,
    labels_n: Tensor,
    exact: torch.dtype,
    vocab_start: int,
    vocab_reduce: VocabReduce | None,
    gradients: bool,
    softcap: float,
    z_coefficient: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the summed loss () of a chunk and the log-partition (n, 1), in dtype `exact`, and with `gradients` the
    gradient of the logits, softmax minus one-hot, (n, V) in their dtype. Rows of ignored labels are not zeroed in it.
    """
    dtype = logits_nV.dtype
    if softcap:
        logits_nV = (logits_nV.to(exact) / softcap).tanh_().mul_(softcap)
    first_n1 = logits_nV[:, :1].to(exact)
    log_p_nV = _log_softmax(logits_nV, exact, vocab_reduce)
    log_sum_n1 = first_n1 - log_p_nV[:, :1]
    here_n1 = (labels_n != IGNORE_INDEX).unsqueeze(-1)  # rows whose label is in this process's vocabulary shard
    # column of the label in this shard; 0 for ignored labels
    row_n1 = labels_n.masked_fill(labels_n == IGNORE_INDEX, vocab_start).unsqueeze(-1) - vocab_start
    if vocab_reduce is not None:  # the label may belong to another process: clamp to a valid column, masked by here_n1
        rows = logits_nV.shape[1]
        here_n1 = here_n1 & (row_n1 >= 0) & (row_n1 < rows)
        row_n1 = row_n1.clamp(0, rows - 1)
    # this shard's part of the loss; the caller sums it over the processes
    loss = -log_p_nV.gather(-1, row_n1).masked_fill_(~here_n1, 0).sum()
    if not gradients:
        return loss, log_sum_n1, None
    d_logits_nV = log_p_nV.exp_()  # in place: softmax (n, V), then minus 1 at the label
    if z_coefficient:
        d_logits_nV.mul_(1 + 2 * z_coefficient * log_sum_n1)
    d_logits_nV.scatter_add_(-1, row_n1, -here_n1.to(exact))
    if softcap:  # the derivative of cap * tanh(z / cap) is 1 - tanh^2
        d_logits_nV.mul_(logits_nV.div_(softcap).square_().neg_().add_(1))
    return loss, log_sum_n1, d_logits_nV.to(dtype)


def _fusible_loss(
    logits_nV: Tensor, labels_n: Tensor, softcap: float, z_coefficient: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `_loss_of_chunk` of a single process, from float32 operations that compile to one pass over the logits."""
    z_nV = logits_nV.float()
    if softcap:
        tanh_nV = torch.tanh(z_nV / softcap)
        z_nV = softcap * tanh_nV
    log_sum_n1 = torch.logsumexp(z_nV, -1, keepdim=True)
    counted_n = labels_n != IGNORE_INDEX
    row_n1 = labels_n.masked_fill(~counted_n, 0).unsqueeze(-1)
    loss = ((log_sum_n1 - z_nV.gather(-1, row_n1)).squeeze(-1) * counted_n).sum()
    one_hot_nV = torch.arange(z_nV.shape[1], device=z_nV.device) == row_n1
    p_nV = (z_nV - log_sum_n1).exp()
    if z_coefficient:
        p_nV = p_nV * (1 + 2 * z_coefficient * log_sum_n1)
    d_logits_nV = p_nV - one_hot_nV.float()
    if softcap:
        d_logits_nV = d_logits_nV * (1 - tanh_nV * tanh_nV)
    return loss, log_sum_n1, d_logits_nV.to(logits_nV.dtype)


@cache
def _compiled_loss() -> Callable[[Tensor, Tensor, float, float], tuple[Tensor, Tensor, Tensor]]:
    # static shapes: at most four, those of training and of validation, whose last chunks may be shorter
    return torch.compile(_fusible_loss, dynamic=False)


def _log_softmax(logits_nV: Tensor, dtype: torch.dtype, vocab_reduce: VocabReduce | None) -> Tensor:
    """Return log softmax of these columns (n, V), normalized over the columns of all processes."""
    if vocab_reduce is None:
        return F.log_softmax(logits_nV, -1, dtype=dtype)
    logits_nV = logits_nV.to(dtype)
    # subtract the maximum over all processes (n, 1), then log sum exp over all processes (n, 1)
    logits_nV = logits_nV - vocab_reduce.all_reduce_max(logits_nV.amax(-1, keepdim=True))
    return logits_nV.sub_(vocab_reduce.all_reduce_sum(logits_nV.exp().sum(-1, keepdim=True)).log_())
