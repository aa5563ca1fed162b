"""Activation checkpointing (arXiv 1604.06174): keep less of the forward pass and recompute it in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from components.units import PositiveCount

ACMode = Literal["none", "full", "selective"] | PositiveCount
"""Which blocks are recomputed: none, all ("full"), every n-th (a number n), or all but `OPS_TO_SAVE` ("selective")."""

OPS_TO_SAVE = {"mm", "addmm", "bmm", "baddbmm", "grouped_mm", "mm_float32", "_scaled_mm", "sort", "topk"}
"""Operations whose results selective checkpointing keeps, with every kind of attention: matrix products, which are
expensive to recompute, and the sort that routes tokens to experts, many kernel launches for a small result on a GPU."""
_ATTENTION_PREFIXES = ("_scaled_dot_product", "flex_attention")


def apply_activation_checkpointing(blocks: Iterable[nn.Module], mode: ACMode) -> None:
    """Checkpoint `blocks` in place, without renaming any parameter. The computed values are the same in every mode.

    `full`: every block keeps its input only. A number n: every n-th block does. `selective`: every block also keeps
    the results of `OPS_TO_SAVE`.
    """
    if mode == "none":
        return
    for number, block in enumerate(blocks, 1):
        if isinstance(mode, int) and number % mode:
            continue
        contexts = {"context_fn": _selective_contexts} if mode == "selective" else {}
        block.forward = partial(_checkpointed_forward, block.forward, contexts)


def is_saved_op(operation: Any) -> bool:
    """Return whether selective checkpointing keeps the result of `operation`, an overload or higher-order operator.

    The run and its memory estimate both decide by this function.
    """
    # `mm` of `aten.mm.default`, `flex_attention` of the higher-order operator
    name = str(getattr(operation, "_opname", None) or getattr(operation, "_name", ""))
    return name in OPS_TO_SAVE or name.startswith(_ATTENTION_PREFIXES)


def _checkpointed_forward(forward: Callable[..., Any], contexts: dict[str, Any], *args: Any) -> Any:
    # nothing in a block is random, so there is no random state to keep
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **contexts)


def _selective_contexts() -> tuple[Any, Any]:
    contexts: tuple[Any, Any] = create_selective_checkpoint_contexts(_policy)
    return contexts


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if is_saved_op(operation) else CheckpointPolicy.PREFER_RECOMPUTE
