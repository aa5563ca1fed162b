"""Rotary position embedding (RoPE; Su et al. 2021, arXiv 2104.09864), half-rotation layout, with its scalings.

Channel i of a head is paired with channel i + C/2, as in `transformers`; Meta's files pair 2i with 2i + 1. The scalings
are those of `transformers`: linear (kaiokendev 2023), dynamic NTK (bloc97 and emozilla 2023), YaRN (arXiv 2309.00071)
and that of Llama 3.1.

B batch, T sequence, H heads, C head width
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from components.errors import InputError
from components.units import PositiveCount

_OF_ONE_TYPE = {
    "low_freq_factor": "llama3", "high_freq_factor": "llama3",
    "beta_fast": "yarn", "beta_slow": "yarn", "attention_factor": "yarn",
}  # fmt: skip
"""Key -> the only type of scaling that uses it."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """A scaling of the rotary frequencies, for contexts longer than those of pre-training."""

    type: Literal["llama3", "linear", "dynamic", "yarn"] = "llama3"
    """"linear" divides all frequencies by `factor`. "llama3" and "yarn" divide only the low ones. "dynamic" raises
    rope_theta with the length of the sequence, beyond original_max_position."""
    factor: float = 8.0
    """Factor by which the longest wavelengths grow; 1 disables scaling."""
    low_freq_factor: float = 1.0
    """llama3: frequencies with fewer periods than this in original_max_position tokens are divided by `factor`."""
    high_freq_factor: float = 4.0
    """llama3: frequencies with more periods than this in as many tokens are unchanged; others are interpolated."""
    beta_fast: float = 32.0
    """yarn: as high_freq_factor; channels between are interpolated by their index."""
    beta_slow: float = 1.0
    """yarn: as low_freq_factor."""
    attention_factor: float | None = None
    """yarn: factor on queries and keys; unset: 0.1 ln(factor) + 1."""
    original_max_position: PositiveCount = 8192
    """Context length of the model before scaling, in tokens; unused by "linear"."""

    def __post_init__(self) -> None:
        if not self.factor >= 1:
            raise InputError("factor", f"{self.factor} must be at least 1 (no scaling)")
        ranges = {"low_freq_factor": "high_freq_factor", "beta_slow": "beta_fast"}
        for low, high in ranges.items():
            if not 0 < getattr(self, low) < getattr(self, high):
                raise InputError(
                    high, f"{getattr(self, high)} must be above {low} = {getattr(self, low)}, and both above 0"
                )
        for key, used_by in _OF_ONE_TYPE.items():
            if self.type != used_by and getattr(self, key) != getattr(type(self), key):
                raise InputError(key, f'only valid with type = "{used_by}"; this is "{self.type}"')
        if self.attention_factor is not None and not self.attention_factor > 0:
            raise InputError("attention_factor", f"{self.attention_factor} must be above 0")

    @property
    def table_factor(self) -> float:
        """The factor on cosine and sine."""
        if self.type != "yarn":
            return 1.0
        return 0.1 * math.log(self.factor) + 1 if self.attention_factor is None else self.attention_factor

    def frequencies(self, width: int, theta: float, length: int) -> list[float]:
        """Return `rope_frequencies` for a sequence of `length` tokens; only "dynamic" depends on it."""
        if self.type == "dynamic":
            grown = self.factor * max(length / self.original_max_position, 1.0) - (self.factor - 1)
            return rope_frequencies(width, theta * grown ** (width / (width - 2)) if width > 2 else theta)
        plain = rope_frequencies(width, theta)
        kept = self._fractions_kept(plain, width, theta)
        return [part * each + (1 - part) * each / self.factor for part, each in zip(kept, plain, strict=True)]

    def _fractions_kept(self, frequencies: list[float], width: int, theta: float) -> list[float]:
        """Return for each frequency the fraction that is not divided by `factor`."""
        if self.type == "linear":
            return [0.0] * len(frequencies)
        if self.type == "llama3":
            low, high = self.low_freq_factor, self.high_freq_factor
            periods = (self.original_max_position * frequency / (2 * math.pi) for frequency in frequencies)
            return [min(max((each - low) / (high - low), 0.0), 1.0) for each in periods]

        def channel(periods: float) -> float:
            """Return the index of the channel that turns `periods` times in original_max_position tokens."""
            return width * math.log(self.original_max_position / (periods * 2 * math.pi)) / (2 * math.log(theta))

        first, last = max(math.floor(channel(self.beta_fast)), 0), min(math.ceil(channel(self.beta_slow)), width - 1)
        span = last - first or 0.001
        return [1 - min(max((index - first) / span, 0.0), 1.0) for index in range(len(frequencies))]


def rope_frequencies(width: int, theta: float) -> list[float]:
    """Return width / 2 angular frequencies in radians per token, theta ** (-2i / width), highest first."""
    return [theta ** (-2 * i / width) for i in range(width // 2)]


class Rope:
    """The rotary tables of some layers, whose frequencies are cached on each device.

    Copying frequencies to the device in every forward would synchronize. They are not a buffer, so that the meta device
    cannot lose them, FSDP2 cannot cast them, and checkpoints need not contain them.
    """

    def __init__(self, width: int, theta: float, scaling: RopeScaling | None = None) -> None:
        """`width` is the number of channels that rotate."""
        self.width, self.theta, self.scaling = width, theta, scaling
        self._copies: dict[tuple[torch.device, int], Tensor] = {}

    def frequencies(self, length: int = 0) -> list[float]:
        """Return width / 2 frequencies in radians per token, for a sequence of `length` tokens."""
        if self.scaling is None:
            return rope_frequencies(self.width, self.theta)
        return self.scaling.frequencies(self.width, self.theta, length)

    def table(self, length: int, device: torch.device) -> Tensor:
        """Return the `rope_table` of a sequence of `length` tokens."""
        factor = 1.0 if self.scaling is None else self.scaling.table_factor
        return rope_table(length, self._on(device, length), factor)

    def _on(self, device: torch.device, length: int) -> Tensor:
        """Return (C / 2,) float32 on `device`."""
        key = (device, length if self.scaling is not None and self.scaling.type == "dynamic" else 0)
        if (copy := self._copies.get(key)) is not None:
            return copy
        with torch.inference_mode(False):
            copy = torch.tensor(self.frequencies(length), device=device)
        if type(copy) is Tensor:  # do not cache a fake tensor, which is invalid outside of its mode
            self._copies[key] = copy
        return copy


def rope_table(length: int, frequencies_C: Tensor, factor: float = 1.0) -> Tensor:
    """Return `factor` times cosine and signed sine, (2, T, 1, C) float32: factors of a channel and of its partner."""
    positions = torch.arange(length, device=frequencies_C.device, dtype=torch.float32)
    angles_TC = torch.outer(positions, frequencies_C)
    cos, sin = angles_TC.cos(), angles_TC.sin()
    table_2TC = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)))
    return (table_2TC if factor == 1 else table_2TC * factor).unsqueeze(-2)


def apply_rope(x_BTHC: Tensor, rope: Tensor | None) -> Tensor:
    """Rotate the channel pairs of every head by their position; returns (B, T, H, C) in the dtype of `x_BTHC`.

    `rope` is a table of (2, ..., T, 1, R): the first R channels rotate, the others are unchanged; None: no rotation.
    Computed in float32, the dtype of the table, as in torchtitan. Under torch.compile the casts are free.
    """
    if rope is None:
        return x_BTHC
    if rope.shape[-1] < x_BTHC.shape[-1]:
        rotated_BTHR, rest = x_BTHC.split([rope.shape[-1], x_BTHC.shape[-1] - rope.shape[-1]], -1)
        return torch.cat((apply_rope(rotated_BTHR, rope), rest), -1)
    cos, sin = rope
    partner_BTHC = x_BTHC.roll(x_BTHC.shape[-1] // 2, -1)
    return torch.addcmul(x_BTHC * cos, partner_BTHC, sin).to(x_BTHC.dtype)
