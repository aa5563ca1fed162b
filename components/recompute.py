"""Activation checkpointing (arXiv 1604.06174): keep less of the forward pass, and compute it again in backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from components.quantities import PositiveCount

Recompute = Literal["none", "full", "selective"] | PositiveCount

_aten = torch.ops.aten
_ATTENTION = {
    getattr(_aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_attention_math",
    )
    if hasattr(_aten, name)
}
_MATRIX_PRODUCT = _aten.mm.default


def recompute(blocks: Iterable[nn.Module], mode: Recompute) -> None:
    """Let `blocks` drop activations, in place and without renaming any parameter.

    `full`: every block keeps its input only. A number n: every n-th block does. `selective`: every block keeps what is
    costly to compute again, attention and every second matrix product. The numbers computed are the same in all.
    """
    if mode == "none":
        return
    for index, block in enumerate(blocks):
        if isinstance(mode, int) and index % mode:
            continue
        contexts = {"context_fn": _selective} if mode == "selective" else {}
        block.forward = partial(_checkpointed, block.forward, contexts)


def _checkpointed(forward: Callable[..., Any], contexts: dict[str, Any], *args: Any) -> Any:
    # nothing in a block is random, so there is no random state to keep
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **contexts)


def _selective() -> tuple[Any, Any]:
    products = {False: 0, True: 0}  # in forward, in recomputation

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = operation in _ATTENTION
        if operation == _MATRIX_PRODUCT:
            products[context.is_recompute] += 1
            keep = products[context.is_recompute] % 2 == 1
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    contexts: tuple[Any, Any] = create_selective_checkpoint_contexts(policy)
    return contexts
