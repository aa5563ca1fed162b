"""Build the model of a recipe, and check that it supports what the recipe asks for."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from components.errors import InputError
from components.interfaces import PackedDataset, Tokenizer
from components.token_ids import fit_vocabulary
from recipes.config import Config
from recipes.errors import config_errors_at
from recipes.interfaces import HasParallelPlan, LanguageModel, SupportsContextParallelism, SupportsDocumentMasking

log = logging.getLogger("powertrain")

SEQUENCES_SAMPLED = 64
"""Number of sequences that are searched for the start of a document."""


def build_tokenizer(recipe: Any) -> Tokenizer:
    """Return the tokenizer, without special tokens for which [model] vocab_size has no row, if it can be without."""
    return fit_vocabulary(recipe.tokenizer.build(), getattr(recipe.model, "vocab_size", None))


def build_model(config: Config, vocab_size: int) -> Any:
    """Return the model on the meta device. Raises ConfigError if it does not support what the recipe asks for."""
    recipe = config.recipe
    with config_errors_at(config, "model"), torch.device("meta"):
        model = recipe.model.build(vocab_size=vocab_size, sequence_length=recipe.training.sequence_length)
        if not isinstance(model, LanguageModel):
            raise InputError("use", f"builds a {type(model).__name__}, which is not a recipes.interfaces:LanguageModel")
    if recipe.training.document_masking:
        with config_errors_at(config, "training"):
            require_document_masking(model)
    if recipe.parallel.cp > 1:
        with config_errors_at(config, "parallel"):
            require_context_parallelism(model)
    return model


def transformer_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return by name the blocks to shard, compile and checkpoint one by one; empty for a model without `layers`."""
    if not hasattr(model, "layers"):
        return {}
    return {f"layers.{name}": block for name, block in model.get_submodule("layers").named_children()}


def require_document_masking(model: object) -> None:
    """Raise InputError if the model does not support document masking."""
    if not isinstance(model, SupportsDocumentMasking):
        raise InputError(
            "document_masking",
            f"{type(model).__name__} has no enable_document_masking(first_input); set document_masking = false",
        )


def check_tensor_parallelism(component: object, tp: int) -> None:
    """Raise an error if the model of `component`, a [model], cannot be divided among `tp` ranks."""
    if isinstance(component, HasParallelPlan):
        component.plan(tp=tp)
    elif tp > 1:
        raise ValueError(f"{type(component).__name__} has no plan(tp=...) for tensor parallelism; set parallel.tp = 1")


def require_context_parallelism(model: object) -> None:
    """Raise InputError if the model does not support context parallelism."""
    if not isinstance(model, SupportsContextParallelism):
        raise InputError("cp", f"{type(model).__name__} has no enable_context_parallelism(shards); set parallel.cp = 1")


def enable_document_masking(model: Any, dataset: PackedDataset, first_input: int) -> None:
    """Enable document masking in `model`, and warn if no document begins in a sample of the dataset."""
    model.enable_document_masking(first_input)
    sampled = range(0, len(dataset), -(-len(dataset) // SEQUENCES_SAMPLED))
    if not any(bool((dataset[index] == first_input).any()) for index in sampled):
        log.warning(
            f"document_masking = true: none of {len(sampled)} sampled sequences contains the id {first_input}, "
            "with which documents begin; without it, document masking has no effect"
        )
