"""Processor time of kernel launches: per micro-batch, and from the last backward to the next forward.

    OMP_NUM_THREADS=1 python -m benchmarks.launch_overhead [--recipes llama3b ...] [--modes eager compiled] [--steps 8]

A GPU is idle whenever its host takes longer to launch a kernel than the kernel runs. The number of launches depends on
the blocks, not on their width. Each recipe is therefore trained on the CPU with all its blocks, activation
checkpointing, gradient noise and optimizer, but so narrow, with 16 tokens per micro-batch, that almost only the
launches remain. Times are `time.thread_time` of the training thread, which also runs the backward passes on the CPU.
Other processes are not counted, but slow the processor by up to a factor of three: compare only within one table. A
mixture has four experts, of which two are used, since their number does not change that of the launches on a GPU.

The additional costs of a GPU (cudaLaunchKernel, 2 to 5 microseconds per kernel) and of FSDP2 are not included.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.shared import ROOT, machine, repeat_with, spread
from recipes.config import Config, Override, load
from recipes.pretrain import Trainer

RECIPES = (
    "microllama300m",
    "tinyllama1b",
    "llama3b",
    "powerlm1b",
    "powerlm3b",
    "powermoe1b",
    "powermoe3b",
    "llama3_8b",
)
MICRO_BATCHES, TOKENS, WARM_UP = 3, 16, 2


def narrow_recipe(recipe: str, directory: Path, *, compiled: bool, steps: int) -> Config:
    """Return the recipe with all its blocks, each as small as possible."""
    file = ROOT / "train_configs" / f"{recipe}.toml"
    settings: dict[str, Any] = {
        "run.dir": directory, "run.device": "cpu", "training.precision": "float32", "training.compile": compiled,
        "model.dim": 32, "model.heads": 2, "model.kv_heads": 1, "model.head_dim": 16, "model.ffn_dim": 32,
        "model.vocab_size": 128,
        "tokenizer.use": "benchmarks.shared:Vocabulary", "tokenizer.vocab_size": 128,
        "data.use": "benchmarks.shared:RandomTokens", "validation.data.use": "benchmarks.shared:RandomTokens",
        "validation.interval_steps": "none", "validation.max_sequences": 1, "validation.micro_batch_size": 1,
        "training.sequence_length": TOKENS, "training.micro_batch_size": 1, "lr_schedule.warmup_tokens": 0,
        "training.total_tokens": (steps + WARM_UP + 1) * MICRO_BATCHES * TOKENS,
        "batch.use": "components.batch:Constant", "batch.initial_size": MICRO_BATCHES,
        "checkpoint.interval_steps": "none",
    }  # fmt: skip
    if "moe" in recipe:
        settings |= {"model.experts": 4, "model.top_k": 2}
    return load(file, [Override(key, str(value).lower() if value is True or value is False else str(value))
                       for key, value in settings.items()])  # fmt: skip


class Marks:
    """The processor times, in seconds, of the starts of forward and the ends of backward passes."""

    def __init__(self) -> None:
        self.forward_starts: list[float] = []
        self.backward_ends: list[float] = []

    def forward(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def marked(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():  # not a validation
                self.forward_starts.append(time.thread_time())
            return function(*args, **kwargs)

        return marked

    def backward(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def marked(*args: Any, **kwargs: Any) -> Any:
            function(*args, **kwargs)
            self.backward_ends.append(time.thread_time())

        return marked


def measure(recipe: str, *, compiled: bool, steps: int) -> tuple[int, list[float], list[float]]:
    """Return trainable parameters, ms of each micro-batch and ms of each tail, after the warm-up."""
    torch.compiler.reset()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as cleanup:
        config = narrow_recipe(recipe, Path(folder), compiled=compiled, steps=steps)
        run = Trainer(config, None, cleanup)
        marks = Marks()
        cleanup.callback(setattr, torch.Tensor, "backward", torch.Tensor.backward)
        torch.Tensor.backward = marks.backward(torch.Tensor.backward)  # type: ignore[method-assign]
        run.model.forward = marks.forward(run.model.forward)
        run.train()
        parameters = sum(parameter.requires_grad for parameter in run.model.parameters())
    first = WARM_UP * MICRO_BATCHES
    micro_batches = [1e3 * (end - start) for start, end in zip(marks.forward_starts, marks.backward_ends, strict=True)][
        first:
    ]
    ends, starts = (
        marks.backward_ends[MICRO_BATCHES - 1 :: MICRO_BATCHES],
        marks.forward_starts[MICRO_BATCHES::MICRO_BATCHES],
    )
    tails = [1e3 * (start - end) for end, start in zip(ends, starts, strict=False)][WARM_UP:]
    return parameters, micro_batches, tails


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=RECIPES)
    parser.add_argument("--modes", nargs="+", default=("eager", "compiled"), choices=("eager", "compiled"))
    parser.add_argument("--steps", type=int, default=8, help=f"measured steps, after {WARM_UP} of warm-up")
    arguments = parser.parse_args()
    rows = []
    for recipe in arguments.recipes:
        for mode in arguments.modes:
            parameters, micro_batches, tails = measure(recipe, compiled=mode == "compiled", steps=arguments.steps)
            rows.append(f"| {recipe} | {mode} | {parameters} | {spread(micro_batches)} | {spread(tails)} |")
            print(f"{recipe}, {mode}: {statistics.median(micro_batches):.1f} ms", file=sys.stderr, flush=True)
    print(f"\n{machine()}; {arguments.steps} steps of {MICRO_BATCHES} micro-batches; processor ms, medians (lowest to")
    print("highest)\n")
    print("| recipe | | parameters | ms per micro-batch | ms, last backward to next forward |\n|---|---|---|---|---|")
    print("\n".join(rows))
    print(repeat_with("benchmarks.launch_overhead"))


if __name__ == "__main__":
    main()
