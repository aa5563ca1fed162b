"""Convert a Hugging Face model to the form that a recipe starts from with `[run] init_from`.

    python -m tools.import_hf DIRECTORY OUTPUT

OUTPUT is also a Hugging Face directory: safetensors under current names, a complete config.json, the tokenizer's
files, and a model.toml for a recipe to extend. Exit status: 0 done, 2 for a user error.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

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
from recipes.cli import reports_bad_input
from recipes.config.toml import write_value
from recipes.initial_weights import require_equal_copies

COPIED_FILES = (
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
"""Other files that are copied unchanged."""
_MAX_COPIED_BYTES = 2**28


@reports_bad_input
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.import_hf", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("directory", type=Path, help="a directory with config.json and weights")
    parser.add_argument("output", type=Path, help="the directory to write")
    parser.add_argument("--max-shard-size", default="5GB", help="largest size of one weights file (default: 5GB)")
    parser.add_argument("--force", action="store_true", help="replace the model in OUTPUT")
    options = parser.parse_args(arguments)
    notes = import_model(
        options.directory, options.output, max_shard_bytes=parse_bytes(options.max_shard_size), force=options.force
    )
    print("\n".join(notes))
    print(f'wrote {options.output}; start from it with extends = ["{options.output / "model.toml"}"]')
    return 0


def import_model(directory: Path, output: Path, *, max_shard_bytes: int, force: bool = False) -> list[str]:
    """Convert the model in `directory` to `output`; return notes for the user.

    Raises ValueError or FileNotFoundError, naming the file and the problem.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a directory")
    if directory.resolve() == output.resolve():
        raise ValueError(f"OUTPUT {output} is the input directory; give another one")
    config = read_json(directory / "config.json")
    try:
        name, architecture = architecture_from_config(config)
        keys = architecture.config_from_hf(config)
        with torch.device("meta"):
            model = architecture.build(keys)
        shape = {"architectures": [name], "model_type": architecture.model_type, **architecture.hf_config(model)}
    except ValueError as error:
        raise ValueError(f"{directory / 'config.json'}: {error}") from None
    weights = (PickledWeights if has_only_pickles(directory) else Weights)(directory, ignore=[RECOMPUTED_BUFFERS])
    source = _match_names(directory, weights, model, architecture)
    tensors = {hf_name: weights.specs[stored] for hf_name, stored in source.items()}

    with new_directory(output, force=force) as temporary:
        files = write_weights(
            temporary,
            tensors,
            lambda group: {hf_name: weights.read(source[hf_name]) for hf_name in group},
            max_shard_bytes=max_shard_bytes,
        )
        write_json(temporary / "config.json", _complete_config(config, shape, tensors))
        (temporary / "model.toml").write_text(model_toml(architecture, keys), encoding="utf-8")
        copied = [file for file in COPIED_FILES if _copy_file(directory / file, temporary / file)]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    summary = f"{name} of {parameters:,} parameters, in {files} file{'s' if files > 1 else ''}"
    return [summary, *_notes(weights, source, copied)]


def _match_names(
    directory: Path, weights: PickledWeights | Weights, model: nn.Module, architecture: Architecture
) -> dict[str, str]:
    """Return current name -> stored name of every tensor. Raises ValueError if the weights do not fit the model."""
    try:
        places = match_tensors(model, {stored: described.shape for stored, described in weights.specs.items()})
        require_equal_copies(weights, places)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    stored_as = {part: stored for stored, part in places.items()}
    return {hf_name: stored_as[part] for hf_name, part in architecture.hf_parts(model).items()}


def _notes(weights: PickledWeights | Weights, source: Mapping[str, str], copied: Sequence[str]) -> Iterator[str]:
    """Yield what was changed, left out and copied."""
    yield from weights.notes
    if weights.dropped:
        yield f"left out {len(weights.dropped)} tensors that are recomputed: {weights.dropped[0]} ..."
    if renamed := [f"{stored} as {hf_name}" for hf_name, stored in source.items() if stored != hf_name]:
        yield f"read {', '.join(renamed)}"
    yield f"copied {', '.join(copied)}" if copied else "no tokenizer or generation_config.json to copy"


def model_toml(architecture: Architecture, keys: Mapping[str, Any]) -> str:
    """Return a file for recipes to extend: the shape as `[model]`, and the location of the weights."""
    lines = [
        "# A recipe that extends this file continues the training of the model in this directory.",
        "[run]",
        'init_from = "."',
        "",
        "[model]",
        f"use = {write_value(architecture.use)}",
    ]
    lines += [f"{key} = {write_value('none' if value is None else value)}" for key, value in keys.items()]
    return "\n".join(lines) + "\n"


def _complete_config(
    original: Mapping[str, Any], shape: Mapping[str, Any], tensors: Mapping[str, TensorSpec]
) -> dict[str, Any]:
    """Return the original config.json with defaults filled in, under current names, and without custom code."""
    kept = {key: value for key, value in original.items() if key not in ("torch_dtype", "auto_map", *shape)}
    kept |= {key: original[key] for key in ("initializer_range", "router_aux_loss_coef") if key in original}
    return {**shape, **kept, "dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch.")}


def _copy_file(source: Path, target: Path) -> bool:
    """Copy a file; return whether there is one. Raises ValueError if it is too large."""
    if not is_file(source):
        return False
    if (size := source.stat().st_size) > _MAX_COPIED_BYTES:
        raise ValueError(f"{source} has {size:,} bytes; at most {_MAX_COPIED_BYTES:,} are copied")
    shutil.copyfile(source, target)
    return True


if __name__ == "__main__":
    sys.exit(run_command(main))
