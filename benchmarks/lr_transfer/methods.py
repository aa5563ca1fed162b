"""The methods compared: three ways to set a learning rate, for every width, batch and length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from recipes.cli import ROOT
from tools.sweep.grid import Job, Settings, Sweep

SEQUENCE_LENGTH = 128
HEAD_DIM = 32
BASE_WIDTH = 256
"""The published base width of muP: learning rates and amplitudes are those of a model of this width."""
WARMUP_TOKENS = 60_000
"""In tokens, equal at every length, as in Power: 59 steps of a batch of 8, 15 of 32."""

SHARED: Settings = {
    "model.layers": "2", "training.sequence_length": str(SEQUENCE_LENGTH), "training.micro_batch_size": "8",
    "training.precision": "float32", "run.device": "cpu", "gradient_noise.interval_steps": "none",
    "validation.interval_steps": "none", "validation.max_sequences": "1024", "validation.micro_batch_size": "16",
    "lr_schedule.warmup_tokens": str(WARMUP_TOKENS),
    "lr_schedule.decay": "exponential", "lr_schedule.decay_fraction": "0.2",
}  # fmt: skip
MUP: Settings = {
    "model.init_std": "0.1", "model.mup.base_width": str(BASE_WIDTH), "model.mup.embedding_multiplier": "12",
    "model.mup.residual_multiplier": "1",
}  # fmt: skip
"""The settings of PowerLM, except the residual multiplier: the published 0.22 to 0.26 is for 32 and 40 layers."""


@dataclass(frozen=True, eq=False)
class Method:
    """A way to set the learning rate, and the values of its tuned key."""

    name: str
    settings: Settings
    lr_key: str
    lrs: Sequence[str]


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
    """The groups."""

    widths: Sequence[int] = (64, 128, 256)
    batches: Sequence[int] = (8, 32)
    tokens: Sequence[int] = (300_000, 1_200_000)
    seeds: int = 1


def sweep_of(method: Method, grid: Grid, text: Mapping[str, Path]) -> Sweep:
    """Return the sweep of a method. `text`: the paths of data, validation data and tokenizer, by key."""
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
            [{method.lr_key: lr} for lr in method.lrs],
            [{"run.seed": str(seed)} for seed in range(grid.seeds)],
        ],
    )


def relative_cost(job: Job) -> int:
    """Return a number that grows with the time of a run: short runs go first, so that early reports have results."""
    return int(job.varied["training.total_tokens"]) * int(job.varied["model.dim"])
