"""The weights of a Hugging Face directory as those a run starts from: `[run] init_from`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from components.errors import InputError, MissingFileError
from components.safetensors import PickledWeights, Weights, only_pickles, read_json
from models.hf.architectures import Architecture, architecture_from_config, architecture_from_model, match_tensors
from models.hf.weights import RECOMPUTED_BUFFERS
from models.init import copy_sharded

log = logging.getLogger("powertrain")

COMPUTE_KEYS = ("norm_eps", "rope_theta", "rope_scaling", "mup", "top_k")
"""Keys of [model] that fit any weights, and change what they compute."""
IGNORED_KEYS = ("size", "max_sequence_length")


def load_initial_weights(model: nn.Module, directory: Path) -> None:
    """Fill every parameter of `model`, sharded or not, from `directory`: each rank reads its own share.

    Raises ValueError or FileNotFoundError, beginning with `init_from: `, before anything was changed.
    """
    try:
        for warning in check_initial_weights(model, directory):
            log.warning(f"run.init_from: {warning}")
        with Weights(directory, ignore=[RECOMPUTED_BUFFERS]) as weights:
            copy_weights(model, weights)
    except FileNotFoundError as error:
        raise MissingFileError("init_from", str(error)) from None
    except ValueError as error:
        raise InputError("init_from", str(error)) from None
    log.info(f"weights from {directory}")


def check_initial_weights(model: nn.Module, directory: Path) -> list[str]:
    """What `model` will compute otherwise than the model in `directory`; no tensor is read.

    Raises ValueError where the weights do not fit, FileNotFoundError where there are none.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is no directory")
    config = read_json(directory / "config.json")
    name, architecture = architecture_from_config(config)
    mine, own = architecture_from_model(model)
    if own is not architecture:
        raise ValueError(
            f"{directory} holds a {name}, and [model] is a {mine}; tools.import_hf writes a model.toml with the keys "
            f"it takes, of which use = {architecture.use!r} is one"
        )
    theirs, ours = architecture.config_from_hf(config), architecture.config_from_hf(architecture.hf_config(model))
    _require_same_shape(directory, theirs, ours, architecture)
    if only_pickles(directory):
        raise ValueError(f"{directory} has no safetensors; python -m tools.import_hf {directory} OUTPUT writes them")
    with Weights(directory, ignore=[RECOMPUTED_BUFFERS]) as weights:
        match_tensors(model, {name: described.shape for name, described in weights.described.items()})
        notes = weights.notes
    return notes + [
        f"{key} = {theirs.get(key)} there, {ours.get(key)} in [model]"
        for key in COMPUTE_KEYS
        if theirs.get(key) != ours.get(key)
    ]


def copy_weights(model: nn.Module, weights: Weights | PickledWeights) -> None:
    """Read every parameter of `model` from `weights`, whose names and shapes must be those of its architecture.

    Raises ValueError for a second copy of a tied matrix that is no copy.
    """
    places = match_tensors(model, {name: described.shape for name, described in weights.described.items()})
    require_equal_copies(weights, places)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _copy(parameter, weights, places[name])


def require_equal_copies(weights: Weights | PickledWeights, places: dict[str, str]) -> None:
    """Raises ValueError if a tensor that is stored beside its tied twin is not equal to it."""
    for extra in sorted(weights.described.keys() - set(places.values())):
        twin = places["tok_embeddings.weight"]
        if weights.described[extra] != weights.described[twin] or not torch.equal(
            weights.read(extra), weights.read(twin)
        ):
            raise ValueError(f"{extra} and {twin} are said to be tied, and differ; set tie_word_embeddings to false")


def _copy(parameter: Tensor, weights: Weights | PickledWeights, stored: str) -> None:
    if isinstance(parameter, DTensor) and all(type(p) in (Shard, Replicate) for p in parameter.placements):
        shape, start = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        if 0 in shape:
            return  # more ranks than rows: this one has nothing of it
        slices = tuple(slice(first, first + length) for first, length in zip(start, shape, strict=True))
        parameter.to_local().copy_(weights.read(stored, slices))
    else:  # whole, or sharded over slices, where a rank's rows do not lie together
        copy_sharded(parameter, weights.read(stored).to(parameter.dtype))


def _require_same_shape(
    directory: Path, theirs: dict[str, Any], ours: dict[str, Any], architecture: Architecture
) -> None:
    other = [key for key in theirs if key not in (*COMPUTE_KEYS, *IGNORED_KEYS) and theirs[key] != ours.get(key)]
    if other:
        there = ", ".join(f"{key} = {theirs[key]}" for key in other)
        here = ", ".join(f"{key} = {ours.get(key)}" for key in other)
        raise ValueError(f"{directory} has {there}; [model] has {here}. Set these keys of {architecture.use} as there")
