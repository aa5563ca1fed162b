"""What is compared: three ways to set a learning rate, on every width, batch and length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from recipes.cli import ROOT
from tools.sweep.grid import Job, Settings, Sweep

SEQUENCE = 128
HEAD_DIM = 32
BASE_WIDTH = 256
"""Of muP, as published: rates and amplitudes are those of a model this wide."""
WARMUP = 60_000
"""Tokens, at every length, as Power has it: 59 steps of a batch of 8, 15 of 32."""

SHARED: Settings = {
    "model.layers": "2", "training.sequence_length": str(SEQUENCE), "training.micro_batch_size": "8",
    "training.precision": "float32", "run.device": "cpu", "gradient_noise.interval_steps": "none",
    "validation.interval_steps": "none", "validation.max_sequences": "1024", "validation.micro_batch_size": "16",
    "lr_schedule.warmup_tokens": str(WARMUP), "lr_schedule.decay": "exponential", "lr_schedule.decay_fraction": "0.2",
}  # fmt: skip
MUP: Settings = {
    "model.init_std": "0.1", "model.mup.base_width": str(BASE_WIDTH), "model.mup.embedding_multiplier": "12",
    "model.mup.residual_multiplier": "1",
}  # fmt: skip
"""PowerLM's, but for the residual multiplier: theirs, 0.22 to 0.26, is for 32 and 40 layers."""


@dataclass(frozen=True, eq=False)
class Method:
    """A way to set the rate, and the values of its one setting."""

    name: str
    settings: Settings
    rate_key: str
    rates: Sequence[str]


METHODS = (
    Method("WSD", {}, "lr_schedule.max_lr", ("5e-4", "1e-3", "2e-3", "4e-3", "8e-3", "1.6e-2")),
    Method("WSD, muP", MUP, "lr_schedule.max_lr", ("2e-3", "4e-3", "8e-3", "1.6e-2", "3.2e-2", "6.4e-2")),
    Method(
        "Power, muP",
        {**MUP, "lr_schedule.use": "components.lr_schedules:Power", "lr_schedule.max_lr": "0.02"},
        "lr_schedule.a",
        ("1", "2", "4", "8", "16", "32"),
    ),
)


@dataclass(frozen=True)
class Grid:
    """The cells."""

    widths: Sequence[int] = (64, 128, 256)
    batches: Sequence[int] = (8, 32)
    tokens: Sequence[int] = (300_000, 1_200_000)
    seeds: int = 1


def sweep_of(method: Method, grid: Grid, text: Mapping[str, Path]) -> Sweep:
    """Every rate in every cell. `text`: where data, held-out data and tokenizer lie, by key."""
    widths = [
        {
            "model.dim": str(width),
            "model.heads": str(width // HEAD_DIM),
            "model.kv_heads": str(width // HEAD_DIM),
            "model.ffn_dim": str(3 * width),
        }
        for width in grid.widths
    ]
    return Sweep(
        ROOT / "train_configs" / "own_text.toml",
        {**SHARED, **method.settings, **{key: str(path.absolute()) for key, path in text.items()}},
        [
            [{"training.total_tokens": str(tokens)} for tokens in grid.tokens],
            [{"batch.initial_size": str(batch)} for batch in grid.batches],
            widths,
            [{method.rate_key: rate} for rate in method.rates],
            [{"run.seed": str(seed)} for seed in range(grid.seeds)],
        ],
    )


def cost(job: Job) -> int:
    """Grows with the time a run takes: short ones first, so that a report tells something early."""
    return int(job.varied["training.total_tokens"]) * int(job.varied["model.dim"])
