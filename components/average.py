"""Averages of the weights over training: an exponential one, and one over a window of tokens.

Both are means of the weights after each step, with weights in tokens, so that they do not depend on how many tokens a
step has. An average works on this rank's shards, float32, one for each parameter, and never reads from the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from components.errors import InputError
from components.units import PositiveCount, Tokens


@dataclass(frozen=True, kw_only=True)
class Exponential:
    """An exponential moving average whose half-life is a number of tokens, whatever the batch size.

    The weights after a step of B tokens that lies t tokens back count 2**(-t / half_life) * (1 - 2**(-B / half_life)),
    divided by the sum of these factors. The average is therefore unbiased; its first step sets it to the weights.
    """

    half_life_tokens: PositiveCount
    """Tokens after which the weights of a step count half as much."""
    start_tokens: Tokens = 0
    """Tokens of the run before the average starts, for example the warm-up."""

    @property
    def num_copies(self) -> int:
        return 1

    def build(self, *, copies: Sequence[Sequence[Tensor]]) -> ExponentialAverage:
        """Return the average, stored in `copies[0]`."""
        return ExponentialAverage(self, copies[0])


class ExponentialAverage:
    """The exponential moving average of one run."""

    def __init__(self, config: Exponential, mean: Sequence[Tensor]) -> None:
        self.config = config
        self.tokens = 0
        """Tokens of the steps that are averaged."""
        self._mean = mean

    @property
    def has_started(self) -> bool:
        return self.tokens > 0

    def update(self, weights: Sequence[Tensor], *, tokens: int, step_tokens: int) -> None:
        if tokens <= self.config.start_tokens:
            return
        self.tokens += step_tokens
        half_life = self.config.half_life_tokens
        # -expm1(-x) is 1 - exp(-x) without rounding to 0, if the half-life is far longer than the step
        step, total = (-math.expm1(-math.log(2) * n / half_life) for n in (step_tokens, self.tokens))
        move_towards(self._mean, weights, step / total)

    def copy_to(self, weights: Sequence[Tensor]) -> None:
        for weight, mean in zip(weights, self._mean, strict=True):
            weight.copy_(mean)

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tokens = int(state["tokens"])


@dataclass(frozen=True, kw_only=True)
class Window:
    """The mean of the weights over a window of the last tokens, in a fixed amount of memory.

    The window is divided into `blocks` of equal length, and one mean is kept for each. The average is that of the
    current block and the `blocks` - 1 before it, so it covers between (1 - 1 / blocks) and 1 times `window_tokens`.
    The weights are sampled at every multiple of `interval_tokens`; a sample counts the tokens since the one before.
    """

    window_tokens: PositiveCount
    """Length of the window in tokens."""
    interval_tokens: PositiveCount | None = None
    """Tokens between two samples; unset: every step."""
    blocks: Annotated[int, Field(ge=2, le=64)] = 2
    """Parts of the window, each a float32 copy of the weights; window_tokens / interval_tokens keeps every sample."""

    def __post_init__(self) -> None:
        if self.interval_tokens is not None and self.interval_tokens * self.blocks > self.window_tokens:
            raise InputError(
                "interval_tokens",
                f"{self.interval_tokens} is longer than a block, window_tokens / blocks = "
                f"{self.window_tokens / self.blocks:g}, so that blocks would have no sample; lower it or `blocks`",
            )

    @property
    def num_copies(self) -> int:
        return self.blocks

    def build(self, *, copies: Sequence[Sequence[Tensor]]) -> WindowAverage:
        """Return the average, with the mean of block n in `copies[n % blocks]`."""
        return WindowAverage(self, copies)


class WindowAverage:
    """The window average of one run."""

    def __init__(self, config: Window, means: Sequence[Sequence[Tensor]]) -> None:
        self.config = config
        self.tokens = 0
        """Tokens of all steps."""
        self.sampled_at = 0
        """`tokens` at the last sample."""
        self.block_tokens = [0] * config.blocks
        """Tokens that the samples in each mean count."""
        self._means = means

    @property
    def has_started(self) -> bool:
        return self.sampled_at > 0

    def update(self, weights: Sequence[Tensor], *, tokens: int, step_tokens: int) -> None:
        interval, before = self.config.interval_tokens or 1, self.tokens
        self.tokens += step_tokens
        if self.tokens // interval == before // interval:
            return
        block = self._block_of(self.tokens)
        for entered in range(self._block_of(self.sampled_at) + 1, block + 1)[-self.config.blocks :]:
            self.block_tokens[entered % self.config.blocks] = 0
        counted, self.sampled_at = self.tokens - self.sampled_at, self.tokens
        place = block % self.config.blocks
        self.block_tokens[place] += counted
        move_towards(self._means[place], weights, counted / self.block_tokens[place])

    def copy_to(self, weights: Sequence[Tensor]) -> None:
        total = sum(self.block_tokens)
        for weight, *means in zip(weights, *self._means, strict=True):
            parts = [mean * (n / total) for mean, n in zip(means, self.block_tokens, strict=True) if n]
            weight.copy_(torch.stack(parts).sum(0))

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "sampled_at": self.sampled_at, "block_tokens": self.block_tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        block_tokens = [int(n) for n in state["block_tokens"]]
        if len(block_tokens) != self.config.blocks:
            raise ValueError(f"{len(block_tokens)} blocks in the state, {self.config.blocks} in the recipe")
        self.tokens, self.sampled_at, self.block_tokens = int(state["tokens"]), int(state["sampled_at"]), block_tokens

    def _block_of(self, tokens: int) -> int:
        """Return the number of the block that ends at or after `tokens`; -1 for the start of the run."""
        return (tokens - 1) * self.config.blocks // self.config.window_tokens


def move_towards(means: Sequence[Tensor], weights: Sequence[Tensor], fraction: float) -> None:
    """Set each mean to mean + fraction * (weight - mean), in place; a fraction of 1 copies the weight exactly."""
    values = [weight.float() for weight in weights]  # itself if it is float32
    if fraction == 1:
        torch._foreach_copy_(list(means), values)
    else:
        torch._foreach_lerp_(list(means), values, fraction)
