"""Initialize a model from the weights of a Hugging Face directory or a checkpoint: `[run] init_from`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from components.checkpoint import verify
from components.checkpoint.load import tensor_index
from components.checkpoint.remote import fetch_model
from components.distributed.collectives import run_on_all_ranks
from components.distributed.context import DistributedContext
from components.errors import InputError
from components.paths import is_file
from components.safetensors import PickledWeights, Weights, has_only_pickles, read_json
from components.storage.address import display
from models.hf.architectures import Architecture, architecture_from_config, architecture_from_model, match_tensors
from models.hf.weights import RECOMPUTED_BUFFERS, Part
from recipes.averages import find_average, load_weights
from recipes.config import Config
from recipes.resume import diff_config, find_checkpoint_at
from recipes.stored_config import load_stored_config
from recipes.training_state import read_run_state

log = logging.getLogger("powertrain")

COMPUTE_KEYS = (
    "norm_eps", "rope_theta", "rope_scaling", "rope_local_theta", "mup", "top_k", "attention_scale",
    "attention_softcap", "logit_softcap", "sliding_window", "global_attention_interval",
)  # fmt: skip
"""Keys of [model] that do not change the shapes of weights, but what the model computes."""
IGNORED_KEYS = ("size", "max_sequence_length")
"""Keys of [model] that are not compared."""


def load_initial_weights(model: nn.Module, config: Config, world: DistributedContext) -> None:
    """Fill every parameter of `model`, sharded or not, from [run] init_from. Each rank reads only its shards.

    Raises InputError or MissingFileError at `init_from` or `average` before any parameter is changed.
    """
    run = config.recipe.run
    directory: Path = run.init_from
    try:
        for warning in check_initial_weights(model, directory):
            log.warning(f"run.init_from: {warning}")
        if (checkpoint := find_initial_checkpoint(directory)) is not None:
            _load_checkpoint(model, checkpoint, config, world)
        elif run.average is not None:
            raise InputError("average", f"{directory} is a Hugging Face directory, which has no averages; remove it")
        else:
            with Weights(directory, ignore=[RECOMPUTED_BUFFERS]) as weights:
                copy_weights(model, weights)
    except InputError:
        raise
    except (FileNotFoundError, ValueError) as error:
        raise InputError.below("init_from", error) from None
    log.info(f"initialized the weights from {display(directory)}")


def find_initial_checkpoint(directory: Path) -> Path | None:
    """Return the checkpoint at `directory`, or the newest of a run directory; None for a Hugging Face directory."""
    fetch_model(directory)
    if is_file(directory / "config.json"):
        return None
    try:
        return find_checkpoint_at(directory)
    except ValueError:
        return None


def _load_checkpoint(model: nn.Module, checkpoint: Path, config: Config, world: DistributedContext) -> None:
    run_on_all_ranks(lambda: verify(checkpoint, rank=world.rank, ranks=world.size), world.gather)
    average = None
    if (name := config.recipe.run.average) is not None:
        recipe = load_stored_config(checkpoint, trusted_config=config, remedy="name this code in the recipe").recipe
        average = find_average(checkpoint, read_run_state(checkpoint), recipe, name)
    for key, before, now in diff_config(checkpoint / "config.toml", config):
        if key.startswith("model."):
            log.warning(f"run.init_from: {key} = {before!r} in the checkpoint, {now!r} in the recipe")
    load_weights(checkpoint, model.state_dict(), average, no_dist=world.size == 1)


def check_initial_weights(model: nn.Module, directory: Path) -> list[str]:
    """Return warnings about what `model` computes differently from the model in `directory`. Reads no tensor.

    Raises ValueError if the weights do not fit, FileNotFoundError if there are none.
    """
    if (checkpoint := find_initial_checkpoint(directory)) is not None:
        entries = tensor_index(checkpoint, no_dist=True).entries
        for name, parameter in model.named_parameters():
            entry, shape = entries.get(f"model.{name}"), tuple(parameter.shape)
            if entry is None or entry.shape != shape:
                found = "nothing of this name" if entry is None else f"the shape {entry.shape}"
                raise ValueError(f"{checkpoint} has {found} for {name}, {shape}; set the [model] of its config.toml")
        return []
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a directory")
    config = read_json(directory / "config.json")
    hf_name, architecture = architecture_from_config(config)
    if not architecture.matches(model):
        model_name, _ = architecture_from_model(model)
        raise ValueError(
            f"{directory} holds a {hf_name}, but [model] is a {model_name}; set use = {architecture.use!r}, with the "
            "keys in the model.toml that tools.import_hf writes"
        )
    hf_keys, model_keys = (
        architecture.config_from_hf(config),
        architecture.config_from_hf(architecture.hf_config(model)),
    )
    _require_same_shape(directory, hf_keys, model_keys, architecture)
    if has_only_pickles(directory):
        raise ValueError(
            f"{directory} has no safetensors files; convert it with python -m tools.import_hf {directory} OUTPUT"
        )
    with Weights(directory, ignore=[RECOMPUTED_BUFFERS]) as weights:
        match_tensors(model, {name: described.shape for name, described in weights.specs.items()})
        notes = weights.notes
    return notes + [
        f"{key} = {hf_keys.get(key)} in config.json, {model_keys.get(key)} in [model]"
        for key in COMPUTE_KEYS
        if hf_keys.get(key) != model_keys.get(key)
    ]


def copy_weights(model: nn.Module, weights: Weights | PickledWeights) -> None:
    """Copy `weights` into the parameters of `model`; names and shapes must be those of its architecture.

    Raises ValueError if a tied matrix is stored twice with different values.
    """
    places = match_tensors(model, {name: described.shape for name, described in weights.specs.items()})
    require_equal_copies(weights, places)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for stored, part in places.items():
            _copy_part(parameters[part.name], weights, stored, part)


def require_equal_copies(weights: Weights | PickledWeights, places: dict[str, Part]) -> None:
    """Raise ValueError if a tied matrix is stored twice with different values."""
    for extra in sorted(weights.specs.keys() - places.keys()):
        twin = next(stored for stored, part in places.items() if part.name == "tok_embeddings.weight")
        if weights.specs[extra] != weights.specs[twin] or not torch.equal(weights.read(extra), weights.read(twin)):
            raise ValueError(f"{extra} and {twin} differ, but config.json ties them; set tie_word_embeddings to false")


@torch.no_grad()
def copy_sharded(parameter: Tensor, full: Tensor) -> None:
    """Copy a full CPU tensor into a parameter of any sharding, device and dtype, without communication."""
    if isinstance(parameter, DTensor):
        # src_data_rank=None: every rank takes its shard from its own copy of the full tensor
        shard = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(shard.to_local())
    else:
        parameter.copy_(full)


def _copy_part(parameter: Tensor, weights: Weights | PickledWeights, stored: str, part: Part) -> None:
    if not part.bounds and not _is_contiguous_shard(parameter):
        copy_sharded(parameter, weights.read(stored).to(parameter.dtype))
        return
    local, start = parameter, (0,) * parameter.dim()
    if isinstance(parameter, DTensor):
        _, start = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
        local = parameter.to_local()
    # the part in the coordinates of the whole parameter, and what this rank has of it
    bounds = [*part.bounds, *((0, size) for size in parameter.shape[len(part.bounds) :])]
    first = [max(low, offset) for (low, _), offset in zip(bounds, start, strict=True)]
    last = [min(high, offset + size) for (_, high), offset, size in zip(bounds, start, local.shape, strict=True)]
    if any(low >= high for low, high in zip(first, last, strict=True)):
        return  # this rank holds no part of it
    target = local[tuple(slice(low - o, high - o) for low, high, o in zip(first, last, start, strict=True))]
    source = tuple(slice(low - b[0], high - b[0]) for low, high, b in zip(first, last, bounds, strict=True))
    tensor = weights.read(stored, source[1:] if part.bounds else source)
    target.copy_(tensor.unsqueeze(0) if part.bounds else tensor)


def _is_contiguous_shard(parameter: Tensor) -> bool:
    """Return whether this rank holds a box of the parameter; strided over TP and FSDP, its rows are not contiguous."""
    return not isinstance(parameter, DTensor) or all(type(p) in (Shard, Replicate) for p in parameter.placements)


def _require_same_shape(
    directory: Path, hf_keys: dict[str, Any], model_keys: dict[str, Any], architecture: Architecture
) -> None:
    other = [
        key for key in hf_keys if key not in (*COMPUTE_KEYS, *IGNORED_KEYS) and hf_keys[key] != model_keys.get(key)
    ]
    if other:
        there = ", ".join(f"{key} = {hf_keys[key]}" for key in other)
        here = ", ".join(f"{key} = {model_keys.get(key)}" for key in other)
        raise ValueError(
            f"{directory} has {there}; [model] has {here}. Set these keys of {architecture.use} to those values"
        )
