"""Activation checkpointing (arXiv 1604.06174): keep less of the forward pass, and compute it again in backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from components.costly_operations import is_costly
from components.units import PositiveCount

Recompute = Literal["none", "full", "selective"] | PositiveCount


def recompute(blocks: Iterable[nn.Module], mode: Recompute) -> None:
    """Let `blocks` drop activations, in place and without renaming any parameter.

    `full`: every block keeps its input only. A number n: every n-th block does. `selective`: every block keeps what is
    costly to compute again, the results of attention and matrix products. The numbers computed are the same in all.
    """
    if mode == "none":
        return
    for number, block in enumerate(blocks, 1):
        if isinstance(mode, int) and number % mode:
            continue
        contexts = {"context_fn": _selective} if mode == "selective" else {}
        block.forward = partial(_checkpointed, block.forward, contexts)


def _checkpointed(forward: Callable[..., Any], contexts: dict[str, Any], *args: Any) -> Any:
    # nothing in a block is random, so there is no random state to keep
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **contexts)


def _selective() -> tuple[Any, Any]:
    contexts: tuple[Any, Any] = create_selective_checkpoint_contexts(_policy)
    return contexts


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if is_costly(operation) else CheckpointPolicy.PREFER_RECOMPUTE
