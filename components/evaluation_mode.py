"""evaluating: a context in which a model is in evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` into evaluation mode, and back into its previous mode at the end, also after an error."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
