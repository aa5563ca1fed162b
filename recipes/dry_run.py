"""What a run would be, worked out without weights, data or a GPU."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from components.batch.layout import BatchLayout
from components.clock import Clock
from components.quantities import format_count
from recipes.config import Config
from recipes.errors import blame

log = logging.getLogger("powertrain")

BYTES_PER_PARAMETER = {"parameters": 4, "gradients": 4, "AdamW moments": 8}
"""Float32 masters, gradients and two moments; all of it is sharded over dp_shard."""


@dataclass(frozen=True)
class Landmark:
    """A step worth showing."""

    step: int
    tokens: int
    batch: int
    lr: float


def describe(config: Config, world_size: int) -> str:
    """A table for people; the batch policy is played through the whole run, told nothing of any gradient."""
    recipe = config.recipe
    training = recipe.training
    with blame(config, "tokenizer"):
        vocab_size = recipe.tokenizer.build().vocab_size
    with blame(config, "model"), torch.device("meta"):
        model = recipe.model.build(vocab_size=vocab_size, sequence_length=training.sequence_length)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    sizes = recipe.parallel.sizes(world_size)
    shards = sizes.dp_shard * sizes.tp
    flops = model.flops_per_token(training.sequence_length)
    layout = BatchLayout(training.micro_batch_size, world_size // sizes.tp)
    landmarks = list(play(recipe, layout))
    lines = [
        f"run            {recipe.run.directory}",
        f"model          {format_count(parameters)} parameters, vocabulary {vocab_size}",
        f"processes      {world_size}, {shards} to a replica",
    ]
    for what, size in BYTES_PER_PARAMETER.items():
        lines.append(f"{what:<15}{parameters * size / shards / 2**20:,.0f} MiB a rank")
    lines += [
        f"batch          multiples of {layout.unit}: {layout.dp_size} ranks x {layout.micro_batch_size} a micro-batch",
        f"tokens         {format_count(training.total_tokens)} in {landmarks[-1].step} steps",
        f"FLOPs          {flops:.3g} a token, {flops * training.total_tokens:.3g} in all",
        "",
        f"{'step':>10} {'tokens':>14} {'batch':>7} {'lr':>10}",
    ]
    lines += [f"{mark.step:>10} {mark.tokens:>14,} {mark.batch:>7} {mark.lr:>10.3g}" for mark in thin(landmarks)]
    return "\n".join(lines)


def play(recipe: object, layout: BatchLayout) -> Iterator[Landmark]:
    """Every step of the run as batch policy and schedule would have it."""
    training = recipe.training  # type: ignore[attr-defined]
    clock = Clock(training.total_tokens, training.sequence_length)
    while not clock.done:
        batch = layout.fit(recipe.batch.samples(clock))  # type: ignore[attr-defined]
        step_tokens = batch.samples * training.sequence_length
        lr = recipe.lr_schedule.lr(clock.tokens, step_tokens, clock.total_tokens)  # type: ignore[attr-defined]
        yield Landmark(clock.step + 1, clock.tokens, batch.samples, lr)
        clock.advance(batch.samples)


def thin(landmarks: list[Landmark]) -> list[Landmark]:
    """First, last, every tenth of the run, and every step at which the batch changes."""
    tenths = {round(i * (len(landmarks) - 1) / 10) for i in range(11)}
    changes = {i for i in range(1, len(landmarks)) if landmarks[i].batch != landmarks[i - 1].batch}
    return [landmarks[i] for i in sorted(tenths | changes)]
