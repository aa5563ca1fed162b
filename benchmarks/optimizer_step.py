"""Time of an optimizer's update on the CPU, beside that of a micro-batch.

    OMP_NUM_THREADS=1 python -m benchmarks.optimizer_step [--sizes 7M 20M] [--rounds 10]

Every optimizer has its own copy of the model and the same random gradients. In each round, forward and backward of one
micro-batch and the update of each optimizer take turns, because the speed of a shared machine drifts; the ratios are
those within a round. A step of n micro-batches has n forwards and one update.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch

from benchmarks.shared import machine, repeat_with, seconds, spread
from benchmarks.throughput import MICRO_BATCH, SEQUENCE, SIZES, VOCAB
from components.optimizers import AdamW, Muon
from models.llama import Llama

OPTIMIZERS = {
    "AdamW": AdamW(),
    "AdamW, bf16 momentum": AdamW(state_dtype="bf16"),
    "Muon": Muon(),
    "NorMuon": Muon(variant="normuon"),
}


def update_of(model: Any, settings: AdamW) -> Callable[[], object]:
    """Return a function that updates a copy of `model` with random gradients."""
    copy = deepcopy(model)
    optimizer = settings.build(model=copy)
    for group in optimizer.param_groups:
        group["lr"] = 1e-4 * group["lr_multiplier"]
    generator = torch.Generator().manual_seed(0)
    for parameter in copy.parameters():
        parameter.grad = 1e-3 * torch.randn(parameter.shape, generator=generator)
    return optimizer.step


def measure(size: str, rounds: int) -> list[str]:
    """Return the rows of a table for one size."""
    shape: dict[str, Any] = {**SIZES[size], "tied_embeddings": False}
    model = Llama(size="debug", **shape).build(vocab_size=VOCAB, sequence_length=SEQUENCE)
    model.init_weights(0)
    tokens = torch.randint(VOCAB, (MICRO_BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(0))

    def micro_batch() -> None:
        model.zero_grad()
        (model(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()).backward()

    turns = {"forward and backward": micro_batch, **{name: update_of(model, each) for name, each in OPTIMIZERS.items()}}
    for turn in turns.values():
        turn()
    times: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds):
        for name in sorted(turns, reverse=bool(number % 2)):
            times[name].append(seconds(turns[name]))
    rows = []
    for name in turns:
        milliseconds = spread([1e3 * each for each in times[name]], ".0f")
        ratios = [one / whole for one, whole in zip(times[name], times["forward and backward"], strict=True)]
        rows.append(f"| {size} | {name} | {milliseconds} | {statistics.median(ratios):.1%} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["7M", "20M"])
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    print(f"{machine()}; micro-batches of {MICRO_BATCH} x {SEQUENCE}, {options.rounds} rounds, float32\n")
    print("| size | | ms | of forward and backward, within a round |\n|---|---|---|---|")
    for size in options.sizes:
        print("\n".join(measure(size, options.rounds)), flush=True)
    print(repeat_with("benchmarks.optimizer_step"))


if __name__ == "__main__":
    main()
