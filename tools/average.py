"""Merge saved checkpoints: write the mean of their weights as a checkpoint without optimizer state.

    python -m tools.average RUN_OR_CHECKPOINT... --output DIR [--last N] [--average NAME]

A run directory stands for all its checkpoints. export_hf, generate, evaluate and `[run] init_from` read DIR; a run
cannot be resumed from it. Exit status: 0 done, 2 for a user error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from components.checkpoint import CheckpointManager, list_checkpoints, verify
from components.distributed.context import DistributedContext
from components.standard_streams import run_command
from recipes.averages import StoredAverage, find_average, load_weights
from recipes.config import ConfigError
from recipes.resume import list_checkpoints_at
from recipes.stored_config import load_stored_config
from recipes.training_state import read_run_state


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.average", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("sources", type=Path, nargs="+", metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--last", type=int, metavar="N", help="use only the N latest checkpoints (default: all)")
    parser.add_argument("--average", metavar="NAME", help="merge this average of the weights (default: the last step)")
    parser.add_argument("--trust-code", action="store_true", help="import the custom code that the checkpoints name")
    options = parser.parse_args(arguments)
    try:
        if options.last is not None and options.last < 1:
            raise ValueError(f"--last {options.last}: expected 1 or more")
        found = {checkpoint: None for source in options.sources for checkpoint in list_checkpoints_at(source)}
        checkpoints = sorted(found, key=lambda checkpoint: read_run_state(checkpoint)["clock"]["tokens"])
        checkpoints = checkpoints[-options.last :] if options.last else checkpoints
        written = merge(checkpoints, options.output, average=options.average, trust_code=options.trust_code)
    except (ConfigError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"wrote {written}: the mean of {len(checkpoints)} checkpoints, {', '.join(c.name for c in checkpoints)}")
    return 0


def merge(checkpoints: Sequence[Path], output: Path, *, average: str | None = None, trust_code: bool = False) -> Path:
    """Write the mean of the weights of `checkpoints`, or of their averages `average`, as a checkpoint in `output`.

    Everything else is that of the last one. Memory holds one model; sums are float64. Returns the checkpoint. Raises
    ValueError, ConfigError or OSError.
    """
    if existing := list_checkpoints(output):
        raise ValueError(f"{existing[-1]} exists; choose another --output")
    sources: list[tuple[Path, StoredAverage | None]] = []
    states = [read_run_state(checkpoint) for checkpoint in checkpoints]
    for checkpoint, state in zip(checkpoints, states, strict=True):
        verify(checkpoint)
        if state["tokenizer"] != states[-1]["tokenizer"]:
            raise ValueError(f"{checkpoint} and {checkpoints[-1]} were trained with different tokenizers")
        config = load_stored_config(checkpoint, trust_code=trust_code)
        sources.append((checkpoint, find_average(checkpoint, state, config.recipe, average)))
    recipe = config.recipe
    with torch.device("meta"):
        model = recipe.model.build(vocab_size=states[-1]["vocab_size"], sequence_length=recipe.training.sequence_length)
    weights = {name: mean_of(name, tensor, sources) for name, tensor in model.state_dict().items()}
    manager = CheckpointManager(output, DistributedContext(0, 1, torch.device("cpu")))
    step = states[-1]["clock"]["step"]
    state = {**states[-1], "average": {}, "merged": [str(checkpoint) for checkpoint in checkpoints]}
    if not manager.save(step, {"model": weights}, state, (checkpoints[-1] / "config.toml").read_text(encoding="utf-8")):
        raise OSError(f"{output} could not be written")  # the manager has logged why
    return manager.path(step)


def mean_of(name: str, like: Tensor, sources: Sequence[tuple[Path, StoredAverage | None]]) -> Tensor:
    """Return the mean of the tensor `name` of all `sources`; that of the last one if it is not floating-point."""
    total = torch.zeros(like.shape, dtype=torch.float64)
    read = torch.empty(like.shape, dtype=like.dtype)
    for checkpoint, average in sources:
        load_weights(checkpoint, {name: read}, average, no_dist=True)
        total += read.double()
    return (total / len(sources)).to(like.dtype) if like.is_floating_point() else read


if __name__ == "__main__":
    sys.exit(run_command(main))
