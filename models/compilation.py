"""What torch.compile needs to compile for a GPU, and the number of variants of a function that it may compile."""

from __future__ import annotations

import os
import shutil
from functools import cache
from importlib.util import find_spec

import torch

RECOMPILE_LIMIT = 64
"""Variants of one function. The shapes of training, validation and tasks, each with and without a window, are more than
the 8 of PyTorch, which runs all others uncompiled."""


def raise_recompile_limit() -> None:
    """Call before compiling: a static shape more is compiled, not run without a fused kernel."""
    torch.compiler.config.recompile_limit = RECOMPILE_LIMIT


@cache
def missing_for_gpu() -> str | None:
    """Return what is not installed here and is needed to compile for a GPU; None if everything is."""
    if find_spec("triton") is None:
        return "the package triton"
    if not os.environ.get("CC") and not any(map(shutil.which, ("gcc", "clang"))):
        return "a C compiler (gcc, clang or $CC)"  # with which Triton builds the code that launches a kernel
    return None
