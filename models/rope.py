"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), half-rotation layout, with Llama 3's scaling.

Channel i of a head is paired with channel i + C/2, as in `transformers`; Meta's files pair 2i with 2i + 1.

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
    """Llama 3.1's scaling of the low frequencies, for contexts longer than those of pre-training."""

    factor: float = 8.0
    """Factor by which the longest wavelengths grow; 1 disables scaling."""
    low_freq_factor: float = 1.0
    """Frequencies with fewer periods than this in original_max_position tokens are divided by `factor`."""
    high_freq_factor: float = 4.0
    """Frequencies with more periods than this in original_max_position tokens are unchanged; others are
    interpolated."""
    original_max_position: PositiveCount = 8192
    """Context length of the model before scaling, in tokens."""

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise InputError("factor", f"{self.factor} must be at least 1 (no scaling)")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise InputError(
                "high_freq_factor",
                f"{self.high_freq_factor} must be above low_freq_factor = {self.low_freq_factor}, and both above 0",
            )
        if self.original_max_position < 1:
            raise InputError("original_max_position", f"{self.original_max_position} must be at least 1")

    def scale(self, frequency: float) -> float:
        """Return the scaled frequency, in radians per token."""
        periods = self.original_max_position * frequency / (2 * math.pi)
        kept = (periods - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = min(max(kept, 0.0), 1.0)
        return kept * frequency + (1 - kept) * frequency / self.factor


def rope_frequencies(width: int, theta: float, scaling: RopeScaling | None = None) -> list[float]:
    """Return width / 2 angular frequencies in radians per token, theta ** (-2i / width), highest first."""
    frequencies = [theta ** (-2 * i / width) for i in range(width // 2)]
    return frequencies if scaling is None else [scaling.scale(frequency) for frequency in frequencies]


class RopeFrequencies:
    """The frequencies of a model, with one cached copy per device.

    Copying them to the device in every forward would synchronize. They are not a buffer, so that the meta device cannot
    lose them, FSDP2 cannot cast them, and checkpoints need not contain them.
    """

    def __init__(self, frequencies: list[float]) -> None:
        self.values = frequencies
        self._copies: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """Return (C / 2,) float32 on `device`."""
        if (copy := self._copies.get(device)) is not None:
            return copy
        with torch.inference_mode(False):
            copy = torch.tensor(self.values, device=device)
        if type(copy) is Tensor:  # do not cache a fake tensor, which is invalid outside of its mode
            self._copies[device] = copy
        return copy


def rope_table(length: int, frequencies_C: Tensor) -> Tensor:
    """Return cosine and signed sine of every position, (2, T, 1, C) float32: factors of a channel and of its
    partner."""
    positions = torch.arange(length, device=frequencies_C.device, dtype=torch.float32)
    angles_TC = torch.outer(positions, frequencies_C)
    cos, sin = angles_TC.cos(), angles_TC.sin()
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))).unsqueeze(-2)


def apply_rope(x_BTHC: Tensor, rope_2T1C: Tensor) -> Tensor:
    """Rotate the channel pairs of every head by their position; returns (B, T, H, C) in the dtype of `x_BTHC`.

    Computed in float32, the dtype of the table, as in torchtitan. Under torch.compile the casts are free.
    """
    cos, sin = rope_2T1C
    partner_BTHC = x_BTHC.roll(x_BTHC.shape[-1] // 2, -1)
    return torch.addcmul(x_BTHC * cos, partner_BTHC, sin).to(x_BTHC.dtype)
