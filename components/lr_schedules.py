"""Learning-rate schedules: pure functions of tokens.

`lr(tokens, batch_tokens, total_tokens)` returns the learning rate of a step of `batch_tokens` tokens that starts after
`tokens` of `total_tokens` were trained. Schedules have no state, so a resumed run needs none. Decay is anchored at the
end of the run: raising total_tokens moves it.

Warm-up includes the tokens of the step itself, (tokens + batch_tokens) / warmup_tokens, so no step has a learning rate
of zero; everything else is evaluated at the first token of the step.

max_lr is meant for one batch size. `batch_scaling` defines the learning rate at others, from the batch of each step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from components.errors import InputError
from components.units import PositiveCount, Tokens

PositiveFloat = Annotated[float, Field(gt=0)]
Ratio = Annotated[float, Field(ge=0, le=1)]

POWER_LAW_SEQ_LEN = 4096
"""Tokens of the sequences in which beta counts the batch: the power law was fitted with sequences of 4096 tokens."""

Decay = Literal["linear", "cosine", "1-sqrt", "exponential"]
DECAYS: dict[Decay, Callable[[float, float], float]] = {
    "linear": lambda p, end: 1 - (1 - end) * p,
    "cosine": lambda p, end: end + (1 - end) * (1 + math.cos(math.pi * p)) / 2,
    "1-sqrt": lambda p, end: 1 - (1 - end) * math.sqrt(p),
    "exponential": lambda p, end: ((1 - end) * math.e ** (1 - p) + end * math.e - 1) / (math.e - 1),
}
"""Decay shapes f(p, end) with f(0) = 1 and f(1) = end (1-sqrt: arXiv 2405.18392, exponential: arXiv 2408.13359)."""

BatchScaling = Literal["none", "sqrt", "linear"]
BATCH_SCALING_EXPONENTS: dict[BatchScaling, float] = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}
"""The learning rate is multiplied by (batch_tokens / reference_batch_tokens) ** exponent."""


def _progress_after_warmup(tokens: int, start: float, end: float) -> float:
    """Return the position of `tokens` in [start, end], from 0 to 1; for an empty interval a step function."""
    if end <= start:
        return float(tokens >= end)
    return min(1.0, max(0.0, (tokens - start) / (end - start)))


@dataclass(frozen=True, kw_only=True)
class _Schedule:
    warmup_tokens: Tokens = 0
    """Tokens over which the learning rate rises linearly from zero."""
    batch_scaling: BatchScaling = "none"
    """How the learning rate scales with the batch size: not, with its square root (Adam: arXiv 2405.14578, 2205.10287),
    or linearly (SGD: arXiv 1706.02677)."""
    reference_batch_tokens: PositiveCount | None = None
    """Tokens of the global batch that max_lr is meant for, where batch_scaling is a factor of 1."""

    def __post_init__(self) -> None:
        if self.batch_scaling != "none" and self.reference_batch_tokens is None:
            raise InputError(
                "reference_batch_tokens",
                f"required by batch_scaling = {self.batch_scaling!r}: the tokens (samples x "
                "sequence_length) of the batch that max_lr is meant for",
            )
        if self.batch_scaling == "none" and self.reference_batch_tokens is not None:
            raise InputError(
                "reference_batch_tokens",
                'has no effect without batch_scaling; set batch_scaling = "sqrt" or "linear", or remove it',
            )

    def _warmup_factor(self, tokens: int, batch_tokens: int) -> float:
        return min(1.0, (tokens + batch_tokens) / self.warmup_tokens) if self.warmup_tokens > 0 else 1.0

    def _batch_factor(self, batch_tokens: int) -> float:
        if self.reference_batch_tokens is None:
            return 1.0
        return float((batch_tokens / self.reference_batch_tokens) ** BATCH_SCALING_EXPONENTS[self.batch_scaling])


@dataclass(frozen=True, kw_only=True)
class Constant(_Schedule):
    """Warm-up, then a constant learning rate."""

    max_lr: PositiveFloat
    """Learning rate after warm-up."""

    def lr(self, tokens: int, batch_tokens: int, total_tokens: int) -> float:
        return self.max_lr * self._warmup_factor(tokens, batch_tokens) * self._batch_factor(batch_tokens)


@dataclass(frozen=True, kw_only=True)
class _DecayToEnd(_Schedule):
    max_lr: PositiveFloat
    """Learning rate at the end of warm-up."""
    min_lr_ratio: Ratio = 0.1
    """Final learning rate, as a fraction of max_lr."""

    shape: ClassVar[Decay]

    def lr(self, tokens: int, batch_tokens: int, total_tokens: int) -> float:
        progress = _progress_after_warmup(tokens, self.warmup_tokens, total_tokens)
        decay = DECAYS[self.shape](progress, self.min_lr_ratio)
        warmup = self._warmup_factor(tokens, batch_tokens)
        return self.max_lr * warmup * decay * self._batch_factor(batch_tokens)


class Cosine(_DecayToEnd):
    """Warm-up, then half a cosine down to min_lr_ratio x max_lr at the end of the run."""

    shape = "cosine"


class Linear(_DecayToEnd):
    """Warm-up, then a straight line down to min_lr_ratio x max_lr at the end of the run."""

    shape = "linear"


@dataclass(frozen=True, kw_only=True)
class _StableThenDecay(_Schedule):
    decay_tokens: Tokens | None = None
    """Length of the decay at the end of the run; excludes decay_fraction."""
    decay_fraction: Ratio | None = None
    """Length of the decay as a fraction of total_tokens; 0.1 if neither is set."""
    decay: Decay = "exponential"
    """Shape of the decay."""
    min_lr_ratio: Ratio = 0.0
    """Final learning rate, as a fraction of that at which the decay starts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decay_tokens is not None and self.decay_fraction is not None:
            raise InputError("decay_tokens", "excludes decay_fraction; set only one of the two")

    def _decay_start(self, total_tokens: int) -> float:
        if self.decay_tokens is not None:
            return max(0.0, total_tokens - self.decay_tokens)
        return total_tokens * (1 - (0.1 if self.decay_fraction is None else self.decay_fraction))

    def _decay_factor(self, tokens: int, total_tokens: int) -> float:
        start = self._decay_start(total_tokens)
        if tokens <= start:
            return 1.0
        return DECAYS[self.decay](_progress_after_warmup(tokens, start, total_tokens), self.min_lr_ratio)


@dataclass(frozen=True, kw_only=True)
class WSD(_StableThenDecay):
    """Warm-up, stable, decay (arXiv 2404.06395)."""

    max_lr: PositiveFloat
    """Learning rate of the stable phase."""

    def lr(self, tokens: int, batch_tokens: int, total_tokens: int) -> float:
        warmup = self._warmup_factor(tokens, batch_tokens)
        return self.max_lr * warmup * self._decay_factor(tokens, total_tokens) * self._batch_factor(batch_tokens)


@dataclass(frozen=True, kw_only=True)
class Power(_StableThenDecay):
    """Power scheduler: lr = min(max_lr, beta * a * tokens**b), with warm-up and decay (arXiv 2408.13359, eqs. 7-8).

    beta is the global batch of the step in sequences of 4096 tokens, so the learning rate scales with a changing batch.
    """

    max_lr: PositiveFloat = 0.02
    """Upper limit of the learning rate (eta_max)."""
    a: PositiveFloat = 4.0
    """Amplitude of the power law."""
    b: Annotated[float, Field(lt=0)] = -0.51
    """Exponent of the power law."""
    batch_scaling: BatchScaling = "none"
    """Must be "none": the power law already scales linearly with the batch."""
    reference_batch_tokens: PositiveCount | None = None
    """Must be unset: the power law uses the batch of every step."""

    def __post_init__(self) -> None:
        if self.batch_scaling != "none" or self.reference_batch_tokens is not None:
            raise InputError(
                "reference_batch_tokens" if self.batch_scaling == "none" else "batch_scaling",
                "Power already scales linearly with the batch (beta, up to max_lr), and a second rule would count it "
                "twice; remove it, or use WSD with a batch_scaling",
            )
        super().__post_init__()

    def lr(self, tokens: int, batch_tokens: int, total_tokens: int) -> float:
        warmup = self._warmup_factor(tokens, batch_tokens)
        # Warm-up rises to the power law at its end, and decay starts from the power law at its start.
        law_tokens = min(max(tokens, self.warmup_tokens), self._decay_start(total_tokens))
        return self._power_law_lr(law_tokens, batch_tokens) * warmup * self._decay_factor(tokens, total_tokens)

    def _power_law_lr(self, tokens: float, batch_tokens: int) -> float:
        if tokens <= 0:  # the law diverges at zero, so the limit applies
            return self.max_lr
        return min(self.max_lr, batch_tokens / POWER_LAW_SEQ_LEN * self.a * tokens**self.b)
