"""[probes.NAME]: the methods of a probe, and the checks of the probes of a recipe.

probe_runner.py calls them. The probes that are shipped are in components/probes/. A custom one is a class with some of
the methods of `Probe`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from components.errors import InputError
from components.probes import ProbedStep
from components.protocol_defaults import with_defaults
from recipes.config import Config
from recipes.errors import config_errors_at


class Probe:
    """The methods of [probes.NAME]; each does nothing by default. A custom class need not derive from this one.

    They are called on every rank, in this order, for step 1 and every `interval_steps` later.
    """

    interval_steps: int = 1
    """Steps between two measurements."""
    sequences: int = 8
    """The first sequences of the batch, on all ranks together, that `watch_forward` samples."""

    def check_model(self, model: nn.Module) -> None:
        """Raise InputError if `model` lacks what the probe needs. Called before the run; `model` may be on the meta
        device."""

    def watch_forward(self, step: ProbedStep) -> Iterator[RemovableHandle]:
        """Register hooks on modules of `step.model` and yield their handles, which are removed after the sample.

        A probe with this method has an additional forward pass over the sample, without gradient and not compiled.
        The hooks see all sequences of a micro-batch; `step.sample(tensor)` returns those that count.
        """
        yield from ()

    def on_micro_gradient(self, step: ProbedStep, name: str, gradient: Tensor) -> None:
        """Called with the gradient of the parameter `name` for every micro-batch, at steps that measure the gradient
        noise. Must not keep the gradient."""

    def on_gradients(self, step: ProbedStep) -> None:
        """Called when the gradients of all micro-batches are reduced over ranks, before they are clipped."""

    def on_update(self, step: ProbedStep) -> None:
        """Called after the optimizer has updated the parameters. There are no gradients any more."""

    def finish(self, step: ProbedStep, values: Mapping[str, Any]) -> Mapping[str, float]:
        """Return metrics by name from the recorded values, which are reduced over all ranks. Called on the host."""
        return values


POINTS = ("watch_forward", "on_micro_gradient", "on_gradients", "on_update")
"""The methods at which a probe can record; it has at least one of them."""


def complete_probe(probe: Any) -> Probe:
    """Return `probe` with defaults for what its class lacks. Raises InputError if it is not a probe."""
    if not any(defines_point(probe, point) for point in POINTS):
        raise InputError("use", f"{type(probe).__name__} is not a probe: it has none of {', '.join(POINTS)}")
    complete = with_defaults(probe, Probe)
    for key in ("interval_steps", "sequences"):
        value = getattr(complete, key)
        if not isinstance(value, int) or value < 1:
            raise InputError(key, f"{value!r}: expected a whole number >= 1")
    return complete


def check_probes(recipe: Any) -> Iterator[tuple[str, str]]:
    """Yield problems between [probes] and other sections, as (dotted path, message)."""
    noise_interval = recipe.gradient_noise.interval_steps
    for name, probe in recipe.probes.items():
        if not defines_point(probe, "on_micro_gradient"):
            continue
        interval = getattr(probe, "interval_steps", Probe.interval_steps)
        if noise_interval is None:
            yield (
                f"probes.{name}",
                'needs the gradient noise, and gradient_noise.interval_steps = "none" never measures it',
            )
        elif interval % noise_interval:
            yield (
                f"probes.{name}.interval_steps",
                f"{interval} must be a multiple of gradient_noise.interval_steps = {noise_interval}: the probe reads "
                "gradients at steps that measure the noise",
            )


def build_probes(config: Config, model: nn.Module) -> dict[str, Probe]:
    """Return the probes of `config` by name. Raises ConfigError at one that does not fit `model`."""
    probes = {}
    for name, probe in config.recipe.probes.items():
        with config_errors_at(config, f"probes.{name}"):
            probes[name] = complete_probe(probe)
            probes[name].check_model(model)
    return probes


def defines_point(probe: Any, point: str) -> bool:
    """Return whether the class of `probe` has the method `point` itself, and not as a default of `Probe`."""
    method = getattr(probe, point, None)
    return callable(method) and getattr(method, "__func__", None) is not vars(Probe)[point]
