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

from components.checkpoint import CheckpointManager, list_checkpoints
from components.distributed.context import DistributedContext
from components.standard_streams import run_command
from recipes.averages import load_weights
from recipes.cli import reports_bad_input
from recipes.resume import list_checkpoints_at
from recipes.trained_model import load_pretrained
from recipes.training_state import read_run_state


@reports_bad_input
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.average", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("sources", type=Path, nargs="+", metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--last", type=int, metavar="N", help="use only the N latest checkpoints (default: all)")
    parser.add_argument("--average", metavar="NAME", help="merge this average of the weights (default: the last step)")
    parser.add_argument("--trust-code", action="store_true", help="import the custom code that the checkpoints name")
    options = parser.parse_args(arguments)
    if options.last is not None and options.last < 1:
        raise ValueError(f"--last {options.last}: expected 1 or more")
    found = {checkpoint: None for source in options.sources for checkpoint in list_checkpoints_at(source)}
    checkpoints = sorted(found, key=lambda checkpoint: read_run_state(checkpoint)["clock"]["tokens"])
    checkpoints = checkpoints[-options.last :] if options.last else checkpoints
    written = merge(checkpoints, options.output, average=options.average, trust_code=options.trust_code)
    print(f"wrote {written}: the mean of {len(checkpoints)} checkpoints, {', '.join(c.name for c in checkpoints)}")
    return 0


def merge(checkpoints: Sequence[Path], output: Path, *, average: str | None = None, trust_code: bool = False) -> Path:
    """Write the mean of the weights of `checkpoints`, or of their averages `average`, as a checkpoint in `output`.

    Everything else is that of the last one. The sums are float64: 12 bytes of memory for each parameter. Returns the
    checkpoint. Raises ValueError, ConfigError or OSError.
    """
    if existing := list_checkpoints(output):
        raise ValueError(f"{existing[-1]} exists; choose another --output")
    sources = [load_pretrained(each, average=average, trust_code=trust_code) for each in checkpoints]
    states = [read_run_state(checkpoint) for checkpoint in checkpoints]
    for checkpoint, state in zip(checkpoints, states, strict=True):
        if state["tokenizer"] != states[-1]["tokenizer"]:
            raise ValueError(f"{checkpoint} and {checkpoints[-1]} were trained with different tokenizers")
    model = sources[-1].build(sources[-1].sequence_length)
    weights = {name: torch.empty(like.shape, dtype=like.dtype) for name, like in model.state_dict().items()}
    sums = {name: torch.zeros(each.shape, dtype=torch.float64) for name, each in weights.items()}
    for source in sources:
        load_weights(source.path, weights, source.average, no_dist=True)
        for name, total in sums.items():
            total += weights[name]
    for name, weight in weights.items():
        if weight.is_floating_point():  # else it stays that of the last checkpoint
            weight.copy_(sums.pop(name) / len(sources))
    manager = CheckpointManager(output, DistributedContext(0, 1, torch.device("cpu")))
    step = states[-1]["clock"]["step"]
    state = {**states[-1], "average": {}, "merged": [str(checkpoint) for checkpoint in checkpoints]}
    if not manager.save(step, {"model": weights}, state, (checkpoints[-1] / "config.toml").read_text(encoding="utf-8")):
        raise OSError(f"{output} could not be written")  # the manager has logged why
    return manager.path(step)


if __name__ == "__main__":
    sys.exit(run_command(main))
