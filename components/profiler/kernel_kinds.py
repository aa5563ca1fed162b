"""The kind of a kernel, operator or range of a profile, by its name.

The names are those of torch 2.11 to 2.13, cuBLAS, cuDNN, FlashAttention, NCCL and inductor; unknown names are
"other kernels". A new library needs a pattern here, and a recorded name in the test.
"""

from __future__ import annotations

import re
from functools import lru_cache

PRODUCTS = "matrix products"
ATTENTION = "attention"
LOSS_PRODUCTS = "loss: matrix products"
LOSS = "loss: other kernels"
GRADIENT_NOISE = "gradient noise"
OPTIMIZER = "optimizer and clipping"
COMMUNICATION = "communication"
COPIES = "memory copies"
OTHER = "other kernels"
DATA = "waiting for data"
BETWEEN_STEPS = "between steps"
IDLE = "idle"

KINDS = (
    PRODUCTS, ATTENTION, LOSS_PRODUCTS, LOSS, OTHER, GRADIENT_NOISE, OPTIMIZER, COMMUNICATION, COPIES, DATA,
    BETWEEN_STEPS, IDLE,
)  # fmt: skip
"""All kinds, in the order of the table."""

PATTERNS: tuple[tuple[str, str], ...] = (
    # Names of inductor's element-wise and reduction kernels contain those of all fused operations, also of products
    # and attention; its templates (triton_tem_) are the products themselves.
    (OTHER, r"^triton_(poi|red|per|for|spl|mix)_"),
    (COMMUNICATION, r"^nccl|^gloo:|^c10d::|^_c10d_functional|^record_param_comms|^symm_mem|multimem_"),
    # FSDP2's copies into and out of communication buffers
    (COMMUNICATION, r"^fsdp::|^FSDP::(all_gather|post_backward_reduce|post_backward_rs_wait)"),
    (BETWEEN_STEPS, rf"^{BETWEEN_STEPS}$"),
    (DATA, r"^next_micro_batch$|^enumerate\(DataLoader\)"),
    (GRADIENT_NOISE, r"^gradient_noise$"),
    (OPTIMIZER, r"^(optimizer|clip_gradients)$|^Optimizer\.|_fused_adam|Fused(Adam|Optimizer)|multi_tensor.*Adam"),
    (LOSS, r"[Cc]ross_?[Ee]ntropy|nll_loss|NllLoss"),
    (
        ATTENTION,
        r"scaled_dot_product|ScaledDotProduct|native_sdpa|flash|fmha|flex_attention|[Ee]fficient_?[Aa]ttention",
    ),
    (PRODUCTS, r"^aten::(mm|addmm_?|bmm|baddbmm_?|mv|addmv_?|_grouped_mm|_scaled_mm|_scaled_grouped_mm)$"),
    (PRODUCTS, r"^mkldnn::_linear|^aten::mkldnn_linear|^aten::_mkl|^mkl::|^aten::_addmm_activation$"),
    (PRODUCTS, r"^nvjet|gemm|Gemm|gemv|cutlass|xmma|cublas|splitK|^triton_(tem|mm)|grouped_mm"),
    (COPIES, r"^Mem(cpy|set) "),
)
"""(kind, regular expression to search in the name). The first match counts."""

_COMPILED = tuple((kind, re.compile(pattern)) for kind, pattern in PATTERNS)


@lru_cache(maxsize=10_000)  # a trace has millions of events with some hundred different names
def kind_of(name: str) -> str | None:
    """Return the kind of `name` by itself; None if no pattern matches."""
    return next((kind for kind, pattern in _COMPILED if pattern.search(name)), None)


def kind_within(name: str, surrounding: str | None) -> str | None:
    """Return the kind of `name` inside of a range or operator of the kind `surrounding`.

    It is that of `surrounding`: all kernels of an optimizer step belong to the optimizer. Exceptions: communication
    keeps its kind everywhere, and the matrix products of the loss are a separate kind.
    """
    own = kind_of(name)
    if own == COMMUNICATION or surrounding in (None, OTHER):
        return own or surrounding
    return LOSS_PRODUCTS if surrounding == LOSS and own == PRODUCTS else surrounding
