"""Load a trained model for evaluation or generation: a checkpoint of this project or a Hugging Face directory."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from components.checkpoint import list_checkpoints, verify
from components.checkpoint.remote import fetch_model
from components.errors import InputError
from components.interfaces import Tokenizer
from components.paths import expand_home, is_file
from components.safetensors import Weights, read_json
from components.storage.address import local_copy_of
from components.token_ids import fit_vocabulary
from components.tokenizers import TokenizerJson
from models.hf.architectures import architecture_from_config
from models.hf.weights import RECOMPUTED_BUFFERS
from recipes.averages import StoredAverage, find_average, load_weights
from recipes.config import Override
from recipes.initial_weights import copy_weights
from recipes.interfaces import ModelConfig, TokenizerConfig
from recipes.resume import find_checkpoint_at
from recipes.stored_config import load_stored_config
from recipes.training_state import read_run_state

log = logging.getLogger("powertrain")

MAX_HF_SEQUENCE_LENGTH = 2048
"""Largest sequence length for a Hugging Face model, whose training length is not known."""


@dataclass(frozen=True, kw_only=True)
class PretrainedModel:
    """A pretrained model whose weights are not read yet."""

    path: Path
    """The checkpoint or the Hugging Face directory."""
    component: ModelConfig
    """[model] of the recipe, or its equivalent for a Hugging Face model."""
    tokenizer: TokenizerConfig | None
    """[tokenizer] of the recipe, or the tokenizer of the directory, if there is one."""
    vocab_size: int
    """Vocabulary size of the training."""
    sequence_length: int
    """Sequence length of the training."""
    document_masking: bool = False
    """Whether the training used document masking."""
    step: int | None = None
    """The training step of the checkpoint."""
    recipe: Any = None
    """The recipe that trained the model; None for a Hugging Face model."""
    add_special_tokens: bool = True
    """Whether documents and prompts begin with the start token of the training, if it had one."""
    average: StoredAverage | None = None
    """The average to use instead of the weights of the last step."""

    def load_tokenizer(self, tokenizer: TokenizerConfig | None = None) -> Tokenizer:
        """Build `tokenizer`, by default that of the model. Raises ValueError or OSError if there is none that fits."""
        chosen: Any = tokenizer or self.tokenizer
        if chosen is None:
            raise ValueError(f"{self.path} has no tokenizer.json with an end-of-document token; name a tokenizer")
        if not self.add_special_tokens and getattr(chosen, "start_of_document", None) is not None:
            chosen = replace(chosen, start_of_document=None)
        built = fit_vocabulary(chosen.build(), self.vocab_size)
        # the embedding of a Hugging Face model may have more rows than its tokenizer has ids
        fits = built.vocab_size == self.vocab_size if self.recipe else built.vocab_size <= self.vocab_size
        if not fits:
            raise ValueError(
                f"{self.path} was trained with a vocabulary of {self.vocab_size}, but the tokenizer has "
                f"{built.vocab_size} ids; use the tokenizer of its training"
            )
        return built

    def build(self, sequence_length: int) -> nn.Module:
        """Return the model on the meta device. Raises ValueError if it does not support that sequence length."""
        with torch.device("meta"):
            return self.component.build(vocab_size=self.vocab_size, sequence_length=sequence_length)

    def load_weights(self, model: nn.Module, *, single_process: bool) -> None:
        """Fill every parameter of `model`; with several processes each reads only its shards.

        Raises ValueError if a file is damaged.
        """
        if self.recipe is not None:
            load_weights(self.path, model.state_dict(), self.average, no_dist=single_process)
            return
        with Weights(self.path, ignore=[RECOMPUTED_BUFFERS]) as weights:
            for note in weights.notes:
                log.warning(note)
            try:
                copy_weights(model, weights)
            except ValueError as error:
                raise ValueError(f"{self.path}: {error}") from None


def load_pretrained(
    path: Path,
    tokenizer: Path | None = None,
    *,
    average: str | None = None,
    add_special_tokens: bool = True,
    trust_code: bool = False,
    trust_option: str = "--trust-code",
    rank: int = 0,
    ranks: int = 1,
) -> PretrainedModel:
    """Load the model at `path`: a run directory (its newest checkpoint), a checkpoint or a Hugging Face directory.

    `tokenizer` is the path of the tokenizer file if it has moved, `average` the name of an average of the weights to
    use; `add_special_tokens` as in `PretrainedModel`. The configuration of a checkpoint may name only code of this
    project, unless `trust_code` is set (error messages name `trust_option`). Each of `ranks` processes verifies a part
    of the checkpoint. Raises ValueError, OSError or ConfigError; InputError at `average` if there is no such average.
    """
    path = local_copy_of(path) or expand_home(path).absolute()
    fetch_model(path)
    if is_file(path / "config.json"):
        if list_checkpoints(path / "checkpoints") or is_file(path / "state.json"):
            raise ValueError(
                f"{path} holds both a Hugging Face model and checkpoints; move one of them to another directory"
            )
        if average is not None:
            raise InputError("average", f"{path} is a Hugging Face directory, which has no averages; name a checkpoint")
        return replace(_load_hugging_face(path, tokenizer), add_special_tokens=add_special_tokens)
    try:
        checkpoint = find_checkpoint_at(path)
    except ValueError as error:
        here = "; it is not a Hugging Face directory either: it has no config.json" if path.is_dir() else ""
        raise ValueError(f"{error}{here}") from None
    verify(checkpoint, rank=rank, ranks=ranks)
    state = read_run_state(checkpoint)
    moved = [Override("tokenizer.path", str(tokenizer.absolute()))] if tokenizer else []
    recipe = load_stored_config(checkpoint, moved, trust_code=trust_code, remedy=f"use {trust_option}").recipe
    return PretrainedModel(
        path=checkpoint,
        component=recipe.model,
        tokenizer=recipe.tokenizer,
        vocab_size=state["vocab_size"],
        sequence_length=recipe.training.sequence_length,
        document_masking=recipe.training.document_masking,
        step=state["clock"]["step"],
        recipe=recipe,
        add_special_tokens=add_special_tokens,
        average=find_average(checkpoint, state, recipe, average),
    )


def _load_hugging_face(directory: Path, tokenizer: Path | None) -> PretrainedModel:
    config = read_json(directory / "config.json")
    try:
        _, architecture = architecture_from_config(config)
        keys = architecture.config_from_hf(config)
        component = architecture.model_config(keys)
    except ValueError as error:
        raise ValueError(f"{directory / 'config.json'}: {error}") from None
    return PretrainedModel(
        path=directory,
        component=component,
        tokenizer=_find_tokenizer(directory, tokenizer, config.get("eos_token_id")),
        vocab_size=keys["vocab_size"],
        sequence_length=min(keys["max_sequence_length"], MAX_HF_SEQUENCE_LENGTH),
    )


def _find_tokenizer(directory: Path, given: Path | None, end: Any) -> TokenizerConfig | None:
    """Return the tokenizer in the file `given`, by default in that of the directory; None if there is none.

    `end` is the id that ends a document if tokenizer_config.json does not name a token.
    """
    file, settings = given or directory / "tokenizer.json", directory / "tokenizer_config.json"
    if given is None and not is_file(file):
        return None
    named = read_json(settings).get("eos_token") if is_file(settings) else None
    if named is None:
        end = end[0] if isinstance(end, list) and end else end
        added = read_json(file).get("added_tokens") or []
        named = next((token for token in added if token.get("id") == end), None)
    named = named.get("content") if isinstance(named, dict) else named
    if not isinstance(named, str):
        return None
    return TokenizerJson(path=file, end_of_document=named, start_of_document="auto")
