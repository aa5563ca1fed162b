"""The plan of a run: size, length, learning rate, batch, decay and loss of a target."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from components.batch import BatchRounding, NoiseScale
from components.lr_schedules import Power
from components.optimizers import AdamW
from recipes.batch_policy import build_batch_rounding
from recipes.dry_run.plan import HardwareTarget
from tools.plan_run.family import Family, Size
from tools.plan_run.ladder import HORIZONS, Ladder
from tools.plan_run.laws import LossLaw, LossPoint, PowerLaw, seed_deviation
from tools.sweep.groups import Group, minimax_lr
from tools.sweep.optimum import Estimate, Optimum

COEFFICIENT = 0.5
"""The batch in units of the noise scale: up to here the square-root rule costs 0.01 nats (docs/findings.md)."""
TIME_CONSTANT, TIME_EXPONENT = 1.084, -0.527
"""The best time constant of weight decay, as a fraction of the run: 1.084 (D / N)^-0.527 (arXiv 2505.13738)."""
WARMUP_FRACTION = 0.01
FAR = 10.0
"""A target this many times beyond the pilot runs is an extrapolation; hours are planned down to sizes so far below."""
SLICES = 1000
"""The predicted steps are added up over this many parts of the run."""


@dataclass(frozen=True)
class Target:
    """What to plan for. Hours give the tokens, and without `parameters` also the size, of the lowest loss."""

    parameters: int | None
    tokens: int | None
    hours: float | None
    devices: int
    hardware: HardwareTarget

    @property
    def flops_per_second(self) -> float | None:
        """Of all devices; None if no device is named."""
        device = self.hardware.per_process(self.devices).device
        return None if device is None else device.flops * self.hardware.mfu * self.devices


@dataclass
class Plan:
    """The plan for a target, from the results of the pilot runs. Raises ValueError if they do not suffice."""

    ladder: Ladder
    family: Family
    target: Target

    def __post_init__(self) -> None:
        self.pilots, self.config = self.ladder.pilots, self.ladder.pilots.config
        self.groups = [
            (size, group)
            for size in self.pilots.sizes
            for group in self.ladder.groups(size)
            if math.isfinite(_lowest_loss(group))
        ]
        deviation = seed_deviation([group.losses[group.best] for _, group in self.groups])
        self.points = [
            LossPoint(size.multiplied, group.tokens, _lowest_loss(group), deviation, self.pilots.seeds)
            for size, group in self.groups
        ]
        self.loss_law = LossLaw.fit(self.points)
        self.size, self.tokens = self._resolve()

    @property
    def sequence_length(self) -> int:
        return int(self.config.recipe.training.sequence_length)

    @cached_property
    def loss(self) -> Estimate:
        return self.loss_law.interval(self.points, self.size.multiplied, self.tokens)

    @cached_property
    def flops_per_token(self) -> float:
        return self.family.flops_per_token(self.size)

    @cached_property
    def lr_law(self) -> PowerLaw | None:
        """The law of the best max_lr; None under Power, whose amplitude is one for all, or without an optimum."""
        found = [(size, group, best) for size, group in self.groups if isinstance(best := group.optimum, Optimum)]
        if self.is_power or not found:
            return None
        variables: dict[str, Sequence[float]] = {"D": [group.tokens for _, group, _ in found]}
        if self.config.recipe.model.resolved_shape.mup is None:
            variables["N"] = [size.multiplied for size, _, _ in found]
        return PowerLaw.of([best.lr for _, _, best in found], variables)

    @cached_property
    def peak_lr(self) -> float:
        """The peak learning rate at the batch of the pilot runs, or the amplitude of Power, to three digits."""
        if self.lr_law is None:
            value, _ = self.minimax_lr
        else:
            value = self.lr_law.at(N=self.size.multiplied, D=self.tokens).value
        return float(f"{value:.3g}")

    @property
    def minimax_lr(self) -> tuple[float, float]:
        """One learning rate for all groups, and how far its loss is above the best of a group at the worst."""
        return minimax_lr([group for _, group in self.groups])

    @cached_property
    def noise_law(self) -> PowerLaw | None:
        """The noise scale in samples after D tokens of the stable phase; None if it was not measured."""
        if not self.noise_points:
            return None
        _, tokens, scales = zip(*self.noise_points, strict=True)
        return PowerLaw.of(scales, {"D": tokens})

    @cached_property
    def noise_points(self) -> list[tuple[Size, float, float]]:
        """Size, tokens and noise scale of the stable phases, near their checkpoints."""
        found = []
        for size in self.pilots.sizes:
            groups, stable = self.ladder.groups(size), self.ladder.stable(size)
            if not groups or not stable:
                continue
            _, outcome = min(stable, key=lambda pair: abs(math.log(pair[0] / groups[-1].best)))
            for horizon in HORIZONS:
                end = self.pilots.stable_tokens(horizon)
                before = [(at, scale) for at, scale in outcome.noise if 0.8 * end <= at <= end and scale > 0]
                if before:
                    middle, scale = np.median(before, axis=0)
                    found.append((size, float(middle), float(scale)))
        return found

    @cached_property
    def rounding(self) -> BatchRounding:
        return build_batch_rounding(self.config.recipe, self.target.devices)

    @cached_property
    def bounds(self) -> tuple[int, int]:
        """The first and the largest batch, in samples."""
        rounding = self.rounding
        if self.noise_law is None:
            return (rounding.round_up(self.pilots.batch).samples,) * 2
        # the noise is measured between two micro-batches
        smallest = rounding.samples_per_micro_step * (1 if rounding.dp_size > 1 else 2)
        first, last = (
            max(smallest, rounding.round_up(math.ceil(COEFFICIENT * self.noise_after(tokens))).samples)
            for tokens in (self.adaptive_from, self.tokens)
        )
        return min(first, last), last

    @property
    def warmup_tokens(self) -> int:
        used = self.pilots.warmup_tokens
        return max(used, round(WARMUP_FRACTION * self.tokens)) if used else 0

    @property
    def adaptive_from(self) -> int:
        """Tokens before which the batch is the first one: the noise of the start does not predict what follows."""
        return max(self.warmup_tokens, round(WARMUP_FRACTION * self.tokens))

    def batch_at(self, tokens: float) -> int:
        """Return the batch that the law predicts after `tokens`, in samples."""
        first, last = self.bounds
        if self.noise_law is None or tokens <= self.adaptive_from:
            return first
        wanted = math.ceil(COEFFICIENT * self.noise_after(tokens))
        return min(last, max(first, self.rounding.round_up(wanted).samples))

    def noise_after(self, tokens: float) -> float:
        assert self.noise_law is not None
        return self.noise_law.value(D=tokens)

    @cached_property
    def steps(self) -> float:
        part = self.tokens / SLICES
        return sum(part / (self.batch_at((number + 0.5) * part) * self.sequence_length) for number in range(SLICES))

    @property
    def mean_batch(self) -> float:
        """In samples."""
        return self.tokens / self.steps / self.sequence_length

    @cached_property
    def weight_decay(self) -> float | None:
        """Of the published law; None where that of the recipe is kept: without decay, and where the law does not hold,
        for another optimizer, a learning rate that falls from the start, or a decay that differs between groups."""
        optimizer = self.config.recipe.optimizer
        if type(optimizer) is not AdamW or self.is_power or optimizer.weight_decay_lr == "group":
            return None
        if not optimizer.weight_decay or optimizer.weight_decay_on == "none":
            return None
        fraction = TIME_CONSTANT * (self.tokens / self.size.multiplied) ** TIME_EXPONENT
        mean_tokens = self.mean_batch * self.sequence_length
        lr = self.peak_lr * math.sqrt(mean_tokens / self.pilots.batch_tokens)
        return float(f"{mean_tokens / (lr * fraction * self.tokens):.3g}")

    @property
    def hours(self) -> float | None:
        speed = self.target.flops_per_second
        return None if speed is None else self.flops_per_token * self.tokens / speed / 3600

    @property
    def is_power(self) -> bool:
        return isinstance(self.config.recipe.lr_schedule, Power)

    @property
    def sets_beta2(self) -> bool:
        """Whether beta2 follows the batch, and the recipe does not say which batch it is meant for."""
        return getattr(self.config.recipe.optimizer, "reference_batch_tokens", 0) is None

    def changes(self) -> dict[str, Mapping[str, Any]]:
        """Return the keys that the recipe of the plan sets, by section."""
        pilots, unit = self.pilots, self.rounding.samples_per_micro_step
        schedule: dict[str, Any] = {
            pilots.lr_key.partition(".")[2]: self.peak_lr, "warmup_tokens": self.warmup_tokens,
            "decay_tokens": "none", "decay_fraction": pilots.decay_fraction,
        }  # fmt: skip
        if not self.is_power:
            schedule |= {"batch_scaling": "sqrt", "reference_batch_tokens": pilots.batch_tokens}
        first, last = self.bounds
        batch: dict[str, Any] = {"use": "components.batch:Constant", "initial_size": first}
        if self.noise_law is not None:
            policy = NoiseScale(
                coefficient=COEFFICIENT, initial_size=first, max_size=last, multiple_of=unit, max_growth=2.0,
                delay_tokens=self.adaptive_from,
            )  # fmt: skip
            keys = {key: "none" if value is None else value for key, value in vars(policy).items()}
            batch = {"use": "components.batch:NoiseScale", **keys}  # all keys: those of the recipe's policy may differ
        optimizer: dict[str, Any] = {}
        if self.sets_beta2:
            optimizer["reference_batch_tokens"] = pilots.batch_tokens
        if self.weight_decay is not None:
            optimizer["weight_decay"] = self.weight_decay
        model = {key.partition(".")[2]: int(value) for key, value in self.size.settings.items()}
        return {
            "model": model, "training": {"total_tokens": self.tokens}, "lr_schedule": schedule, "batch": batch,
            "optimizer": optimizer,
        }  # fmt: skip

    def _resolve(self) -> tuple[Size, int]:
        target = self.target
        if target.parameters is not None:
            size = self.family.of(target.parameters)
            return size, target.tokens if target.tokens is not None else self._affordable(size)
        smallest, largest = (pick(size.parameters for size in self.pilots.sizes) for pick in (min, max))
        found: list[tuple[float, Size, int]] = []
        for parameters in np.geomspace(smallest / FAR, 1000 * largest, 80):
            try:
                size = self.family.of(int(parameters))
            except ValueError:
                continue  # no proportions near this number
            tokens = self._affordable(size)
            if tokens < self.sequence_length * self.pilots.batch:
                break
            found.append((self.loss_law.loss(size.multiplied, tokens), size, tokens))
        if not found:
            raise ValueError("these hours do not suffice for one step of the smallest pilot model")
        _, size, tokens = min(found, key=lambda item: item[0])
        return size, tokens

    def _affordable(self, size: Size) -> int:
        speed = self.target.flops_per_second
        assert speed is not None and self.target.hours is not None
        return int(self.target.hours * 3600 * speed / self.family.flops_per_token(size))


def _lowest_loss(group: Group) -> float:
    """Return the loss at the vertex of a group, or at its best learning rate."""
    best = group.optimum
    return best.loss if isinstance(best, Optimum) else min(group.means.values())
