"""A trained model on disk, to be used and not trained on: a checkpoint of ours, or a Hugging Face directory."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from components.checkpoint import list_checkpoints, load_tensors, verify
from components.interfaces import Tokenizer
from components.paths import is_file
from components.safetensors import Weights, read_json
from components.tokenizers import TokenizerJson
from components.units import expand_home
from models.hf.architectures import architecture_from_config
from models.hf.weights import RECOMPUTED_BUFFERS
from recipes.config import Override
from recipes.initial_weights import copy_weights
from recipes.interfaces import ModelConfig, TokenizerConfig
from recipes.resume import find_checkpoint_at
from recipes.stored_config import load_stored_config
from recipes.training_state import read_run_state

log = logging.getLogger("powertrain")

MAX_UNTRAINED = 2048
"""Tokens of a sequence where it is not known how long those of the training were."""


@dataclass(frozen=True, kw_only=True)
class PretrainedModel:
    """What is known of it before its weights are read."""

    path: Path
    """The checkpoint, or the directory."""
    component: ModelConfig
    """[model]"""
    tokenizer: TokenizerConfig | None
    """[tokenizer], if it has one."""
    vocab_size: int
    """Ids it was trained with."""
    sequence_length: int
    """Tokens of a sequence of its training."""
    document_masking: bool = False
    """As in its training."""
    step: int | None = None
    """Of its training."""
    recipe: Any = None
    """The recipe that trained it, if that is known."""

    def encoder(self, tokenizer: TokenizerConfig | None = None) -> Tokenizer:
        """`tokenizer`, or else its own, ready. Raises ValueError or OSError if there is none, or none that fits."""
        tokenizer = tokenizer or self.tokenizer
        if tokenizer is None:
            raise ValueError(f"{self.path} has no tokenizer.json, or one that does not say which token ends a document")
        encoder = tokenizer.build()
        # a Hugging Face model may have more rows than its tokenizer ids
        fits = encoder.vocab_size == self.vocab_size if self.recipe else encoder.vocab_size <= self.vocab_size
        if not fits:
            raise ValueError(
                f"{self.path} was trained with a vocabulary of {self.vocab_size}, and the tokenizer has "
                f"{encoder.vocab_size} ids; name the tokenizer it was trained with"
            )
        return encoder

    def build(self, sequence_length: int) -> nn.Module:
        """The model on the meta device. Raises ValueError if its sequences cannot be so long."""
        with torch.device("meta"):
            return self.component.build(vocab_size=self.vocab_size, sequence_length=sequence_length)

    def read(self, model: nn.Module, *, alone: bool) -> None:
        """Fill every parameter; `alone` is one process, else each reads the shards it holds.

        Raises ValueError for what is damaged.
        """
        if self.recipe is not None:
            load_tensors(self.path, {"model": model.state_dict()}, no_dist=alone)
            return
        with Weights(self.path, ignore=[RECOMPUTED_BUFFERS]) as weights:
            for note in weights.notes:
                log.warning(note)
            copy_weights(model, weights)


def load_pretrained(
    path: Path,
    tokenizer: Path | None = None,
    *,
    trust_code: bool = False,
    trust_option: str = "--trust-code",
    rank: int = 0,
    ranks: int = 1,
) -> PretrainedModel:
    """What is at `path`: a run directory (its newest checkpoint), a checkpoint or a Hugging Face directory.

    `tokenizer` is the file of its tokenizer, where that is not where it was. A checkpoint's configuration names no code
    but this project's, unless that is trusted (`trust_option` is how the caller's user says so); each of `ranks`
    processes looks for damage in its share of it. Raises ValueError, OSError or ConfigError.
    """
    path = expand_home(path).absolute()
    if is_file(path / "config.json"):
        if list_checkpoints(path / "checkpoints") or is_file(path / "state.json"):
            raise ValueError(f"{path} holds a Hugging Face model and checkpoints; give one of them a folder of its own")
        return _of_hugging_face(path, tokenizer)
    try:
        checkpoint = find_checkpoint_at(path)
    except ValueError as error:
        here = "; nor is there a config.json, as a Hugging Face directory has" if path.is_dir() else ""
        raise ValueError(f"{error}{here}") from None
    verify(checkpoint, rank=rank, ranks=ranks)
    state = read_run_state(checkpoint)
    moved = [Override("tokenizer.path", str(tokenizer.absolute()))] if tokenizer else []
    recipe = load_stored_config(checkpoint, moved, trust_code=trust_code, remedy=f"say {trust_option}").recipe
    return PretrainedModel(
        path=checkpoint,
        component=recipe.model,
        tokenizer=recipe.tokenizer,
        vocab_size=state["vocab_size"],
        sequence_length=recipe.training.sequence_length,
        document_masking=recipe.training.document_masking,
        step=state["clock"]["step"],
        recipe=recipe,
    )


def _of_hugging_face(directory: Path, tokenizer: Path | None) -> PretrainedModel:
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
        tokenizer=_tokenizer(directory, tokenizer, config.get("eos_token_id")),
        vocab_size=keys["vocab_size"],
        sequence_length=min(keys["max_sequence_length"], MAX_UNTRAINED),
    )


def _tokenizer(directory: Path, given: Path | None, end: Any) -> TokenizerConfig | None:
    """The `given` tokenizer.json, or its own, if there is one.

    `end` is the id that ends a document, where no token is named for it.
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
    return TokenizerJson(path=file, end_of_document=named) if isinstance(named, str) else None
