"""The model of a recipe, built and held against what the recipe asks of it."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from components.errors import InputError
from components.interfaces import PackedDataset
from recipes.config import Config
from recipes.errors import config_errors_at
from recipes.interfaces import LanguageModel, SupportsDocumentMasking

log = logging.getLogger("powertrain")

SEQUENCES_SAMPLED = 64
"""Sequences in which an end of a document is looked for."""


def build_model(config: Config, vocab_size: int) -> Any:
    """The model of a training, on the meta device. Raises ConfigError for one that cannot do what is asked of it."""
    recipe = config.recipe
    with config_errors_at(config, "model"), torch.device("meta"):
        model = recipe.model.build(vocab_size=vocab_size, sequence_length=recipe.training.sequence_length)
        if not isinstance(model, LanguageModel):
            raise InputError("use", f"builds a {type(model).__name__}, which is no LanguageModel of recipes.interfaces")
    if recipe.training.document_masking:
        with config_errors_at(config, "training"):
            require_document_masking(model)
    return model


def transformer_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks that are sharded, compiled and checkpointed one by one, by name; none if it has no `layers`."""
    if not hasattr(model, "layers"):
        return {}
    return {f"layers.{name}": block for name, block in model.get_submodule("layers").named_children()}


def require_document_masking(model: object) -> None:
    """Raises ValueError for a model that cannot keep documents apart."""
    if not isinstance(model, SupportsDocumentMasking):
        raise InputError(
            "document_masking",
            f"{type(model).__name__} has no enable_document_masking(end_of_document), which keeps "
            "documents apart; say document_masking = false",
        )


def enable_document_masking(model: Any, samples: PackedDataset, end_of_document: int) -> None:
    """Let `model` attend within documents, and warn where `samples` seem to have none: it would tell none apart."""
    model.enable_document_masking(end_of_document)
    looked_at = range(0, len(samples), -(-len(samples) // SEQUENCES_SAMPLED))
    if not any(bool((samples[index] == end_of_document).any()) for index in looked_at):
        log.warning(
            f"document_masking = true: none of {len(looked_at)} sequences looked at holds the id "
            f"{end_of_document}, which ends a document; where it ends none, whole sequences are attended to"
        )
