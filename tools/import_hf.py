"""Bring a Hugging Face model, old or new, into the form that a recipe starts from with `[run] init_from`.

    python -m tools.import_hf DIRECTORY OUTPUT

OUTPUT is again a Hugging Face directory: safetensors under today's names, a complete config.json, the tokenizer's
files; and a model.toml for a recipe to extend.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from components.paths import is_file
from components.safetensors import (
    PickledWeights,
    TensorSpec,
    Weights,
    has_only_pickles,
    new_directory,
    parse_bytes,
    read_json,
    write_json,
    write_weights,
)
from components.standard_streams import run_command
from models.hf.architectures import Architecture, architecture_from_config, match_tensors
from models.hf.weights import RECOMPUTED_BUFFERS
from recipes.config.toml import write_value
from recipes.initial_weights import require_equal_copies

KEPT = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""Files beside the weights that are copied as they are."""
_LARGEST_KEPT = 2**28


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 for what the user can put right."""
    parser = argparse.ArgumentParser(prog="python -m tools.import_hf", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("directory", type=Path, help="a directory with config.json and weights")
    parser.add_argument("output", type=Path, help="the directory to write")
    parser.add_argument("--max-shard-size", default="5GB", help="the most one file of weights holds (default: 5GB)")
    parser.add_argument("--force", action="store_true", help="replace the model that OUTPUT holds")
    options = parser.parse_args(arguments)
    try:
        notes = import_model(
            options.directory, options.output, max_shard_bytes=parse_bytes(options.max_shard_size), force=options.force
        )
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(notes))
    print(f'wrote {options.output}; start from it with extends = ["{options.output / "model.toml"}"]')
    return 0


def import_model(directory: Path, output: Path, *, max_shard_bytes: int, force: bool = False) -> list[str]:
    """Write the model in `directory` anew, as `output`; returns what there is to note.

    Raises ValueError or FileNotFoundError, naming the file and what is wrong with it.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is no directory")
    if directory.resolve() == output.resolve():
        raise ValueError(f"{output} is the model itself; name another directory")
    config = read_json(directory / "config.json")
    try:
        name, architecture = architecture_from_config(config)
        keys = architecture.config_from_hf(config)
        with torch.device("meta"):
            model = architecture.build(keys)
        shape = {"architectures": [name], "model_type": architecture.model_type, **architecture.hf_config(model)}
    except ValueError as error:
        raise ValueError(f"{directory / 'config.json'}: {error}") from None
    # pickles only where there is nothing better
    pickled = has_only_pickles(directory)
    weights = (
        PickledWeights(directory, ignore=[RECOMPUTED_BUFFERS])
        if pickled
        else Weights(directory, ignore=[RECOMPUTED_BUFFERS])
    )
    try:
        places = match_tensors(model, {stored: described.shape for stored, described in weights.specs.items()})
        require_equal_copies(weights, places)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    source = {theirs: places[ours] for ours, theirs in architecture.hf_names(model).items()}
    tensors = {theirs: weights.specs[stored] for theirs, stored in source.items()}

    with new_directory(output, force=force) as aside:
        files = write_weights(
            aside,
            tensors,
            lambda group: {theirs: weights.read(source[theirs]) for theirs in group},
            max_shard_bytes=max_shard_bytes,
        )
        write_json(aside / "config.json", _config(config, shape, tensors))
        (aside / "model.toml").write_text(model_toml(architecture, keys), encoding="utf-8")
        kept = [file for file in KEPT if _copied(directory / file, aside / file)]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    notes = [f"{name} of {parameters:,} parameters, in {files} file{'s' if files > 1 else ''}", *weights.notes]
    if weights.dropped:
        notes.append(f"left out {len(weights.dropped)} tensors that are computed anew: {weights.dropped[0]} ...")
    if moved := [f"{stored} as {theirs}" for theirs, stored in source.items() if stored != theirs]:
        notes.append(f"read {', '.join(moved)}")
    notes.append(f"copied {', '.join(kept)}" if kept else "no tokenizer or generation_config.json to copy")
    return notes


def model_toml(architecture: Architecture, keys: Mapping[str, Any]) -> str:
    """A layer for recipes: the shape as `[model]`, and where the weights are."""
    lines = [
        "# A recipe that extends this file continues the training of the model beside it.",
        "[run]",
        'init_from = "."',
        "",
        "[model]",
        f"use = {write_value(architecture.use)}",
    ]
    lines += [f"{key} = {write_value('none' if value is None else value)}" for key, value in keys.items()]
    return "\n".join(lines) + "\n"


def _config(original: Mapping[str, Any], shape: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """What the original says, with what it left to defaults filled in, in today's spelling, and naming no code."""
    kept = {key: value for key, value in original.items() if key not in ("torch_dtype", "auto_map", *shape)}
    kept |= {key: original[key] for key in ("initializer_range", "router_aux_loss_coef") if key in original}
    return {**shape, **kept, "dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch.")}


def _copied(source: Path, target: Path) -> bool:
    if not is_file(source):
        return False
    if (size := source.stat().st_size) > _LARGEST_KEPT:
        raise ValueError(f"{source} has {size:,} bytes; at most {_LARGEST_KEPT:,} are copied")
    shutil.copyfile(source, target)
    return True


if __name__ == "__main__":
    sys.exit(run_command(main))
