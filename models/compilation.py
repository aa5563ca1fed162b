"""The number of variants of a function that torch.compile may compile."""

from __future__ import annotations

import torch

RECOMPILE_LIMIT = 64
"""Variants of one function. The shapes of training, validation and tasks, each with and without a window, are more than
the 8 of PyTorch, which runs all others uncompiled."""


def raise_recompile_limit() -> None:
    """Call before compiling: a static shape more is compiled, not run without a fused kernel."""
    torch.compiler.config.recompile_limit = RECOMPILE_LIMIT
