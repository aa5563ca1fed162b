"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), half-rotation layout, with Llama 3's scaling.

Channel i of a head turns together with channel i + C/2, as in `transformers`; Meta's own files pair 2i with 2i + 1.

B batch, T sequence, H heads, C head width
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from components.errors import InputError
from components.units import PositiveCount


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's stretch of the low frequencies, for contexts longer than those of pre-training."""

    factor: float = 8.0
    """How many times longer the slowest waves become; 1 switches scaling off."""
    low_freq_factor: float = 1.0
    """Waves that turn less often than this in original_max_position tokens are stretched by the whole factor."""
    high_freq_factor: float = 4.0
    """Waves that turn more often than this in original_max_position tokens are left alone; in between, interpolated."""
    original_max_position: PositiveCount = 8192
    """The context of the model before it was stretched, in tokens."""

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise InputError("factor", f"{self.factor} would shorten the waves; use 1 (off) or more")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise InputError(
                "high_freq_factor",
                f"{self.high_freq_factor} must be above low_freq_factor = {self.low_freq_factor}, and both above 0",
            )
        if self.original_max_position < 1:
            raise InputError("original_max_position", f"{self.original_max_position} must be at least 1 token")

    def scale(self, frequency: float) -> float:
        """The frequency, in radians per token, that replaces `frequency`."""
        turns = self.original_max_position * frequency / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = min(max(kept, 0.0), 1.0)
        return kept * frequency + (1 - kept) * frequency / self.factor


def rope_frequencies(width: int, theta: float, scaling: RopeScaling | None = None) -> list[float]:
    """(width / 2) angular frequencies in radians per token, fastest first: theta ** (-2i / width)."""
    frequencies = [theta ** (-2 * i / width) for i in range(width // 2)]
    return frequencies if scaling is None else [scaling.scale(frequency) for frequency in frequencies]


class RopeFrequencies:
    """The frequencies of a model, and a copy on each device that asked for one.

    Made on the device in every forward, they would let the host wait for it each time. They are neither a parameter nor
    a buffer: what is no state cannot be lost by the meta device, cast by FSDP2 or left out of a checkpoint.
    """

    def __init__(self, frequencies: list[float]) -> None:
        self.values = frequencies
        self._copies: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """(C / 2,) float32."""
        if (copy := self._copies.get(device)) is not None:
            return copy
        with torch.inference_mode(False):
            copy = torch.tensor(self.values, device=device)
        if type(copy) is Tensor:  # a fake tensor lives no longer than its mode
            self._copies[device] = copy
        return copy


def rope_table(length: int, frequencies_C: Tensor) -> Tensor:
    """Cosine and signed sine of every position, (2, T, 1, C) float32: `[0]` for a channel, `[1]` for its partner."""
    positions = torch.arange(length, device=frequencies_C.device, dtype=torch.float32)
    angles_TC = torch.outer(positions, frequencies_C)
    cos, sin = angles_TC.cos(), angles_TC.sin()
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))).unsqueeze(-2)


def apply_rope(x_BTHC: Tensor, rope_2T1C: Tensor) -> Tensor:
    """Turns every head's channel pairs by their position: (B, T, H, C), in the dtype of `x_BTHC`.

    Computed in the dtype of the table, float32, as torchtitan does it. Compiled, the casts cost nothing.
    """
    cos, sin = rope_2T1C
    partner_BTHC = x_BTHC.roll(x_BTHC.shape[-1] // 2, -1)
    return torch.addcmul(x_BTHC * cos, partner_BTHC, sin).to(x_BTHC.dtype)
