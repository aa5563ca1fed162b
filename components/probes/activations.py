"""Activations of every layer: RMS, maximum, and the hidden units of the feed-forward that do nothing.

B batch, T sequence, D model width, F feed-forward width
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from components.probes.groups import layers_of
from components.probes.probed_step import ProbedStep
from components.units import PositiveCount

DEAD = 0.01
"""A unit is dead if the largest magnitude of its activation is below this fraction of the mean over all units."""
SATURATED = 4.0
"""A unit is saturated if its gate is always above this: SiLU(4) = 3.93, so its gate no longer selects anything."""


@dataclass(frozen=True, kw_only=True)
class Activations:
    """RMS and largest magnitude of the output of each layer, which is the residual stream, and of its attention and
    feed-forward; share of the hidden units of a SwiGLU feed-forward that are dead or saturated on every token of the
    sample."""

    interval_steps: PositiveCount = 100
    """Steps between two measurements; the first step is measured."""
    sequences: PositiveCount = 8
    """The first sequences of the batch, on all ranks together, that are the sample."""

    def check_model(self, model: nn.Module) -> None:
        layers_of(model)

    def watch_forward(self, step: ProbedStep) -> Iterator[RemovableHandle]:
        for layer, block in layers_of(step.model).items():
            yield block.register_forward_hook(_record_output(step, "residual", layer))
            for name in ("attention", "feed_forward"):
                if hasattr(block, name):
                    yield getattr(block, name).register_forward_hook(_record_output(step, name, layer))
            hidden = getattr(block, "feed_forward", None)
            if isinstance(hidden, nn.Module) and hasattr(hidden, "w_gate") and hasattr(hidden, "w_down"):
                units = _Units(step, layer)
                yield hidden.w_gate.register_forward_hook(units.see_gate)  # type: ignore[union-attr]
                yield hidden.w_down.register_forward_pre_hook(units.see_hidden)  # type: ignore[union-attr]

    def finish(self, step: ProbedStep, values: Mapping[str, Any]) -> Mapping[str, float]:
        found = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
        for name, value in values.items():
            if name.startswith("unit_magnitudes_"):
                dead = value < DEAD * value.mean()
                found[f"dead_units_{name.removeprefix('unit_magnitudes_')}"] = float(dead.double().mean())
            elif name.startswith("unit_gates_"):
                saturated = -value > SATURATED
                found[f"saturated_units_{name.removeprefix('unit_gates_')}"] = float(saturated.double().mean())
        return found


def _record_output(step: ProbedStep, quantity: str, layer: str) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        x_BTD = step.sample(output[0] if isinstance(output, tuple) else output)
        step.record_rms(f"{quantity}_rms_{layer}", x_BTD)
        step.record_max(f"{quantity}_max_{layer}", x_BTD.abs())

    return hook


class _Units:
    """Records the largest magnitude of each hidden unit, and its smallest gate, negated because maxima are reduced."""

    def __init__(self, step: ProbedStep, layer: str) -> None:
        self.step, self.layer = step, layer
        self.gate_BTF: Tensor | None = None

    def see_gate(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.gate_BTF = self.step.sample(output)

    def see_hidden(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        (hidden_BTF,) = inputs
        first, units = _local_units(hidden_BTF)
        local_BTF = self.step.sample(hidden_BTF)
        for name, values in (("magnitudes", local_BTF.abs()), ("gates", -self._take_gate())):
            maxima_F = local_BTF.new_full((units,), -torch.inf)
            if len(values):
                maxima_F[first : first + values.shape[-1]] = values.flatten(0, -2).amax(0)
            self.step.record_maxima(f"unit_{name}_{self.layer}", maxima_F)

    def _take_gate(self) -> Tensor:
        gate_BTF, self.gate_BTF = self.gate_BTF, None
        assert gate_BTF is not None, "the gate is computed before the hidden layer"
        return gate_BTF


def _local_units(hidden_BTF: Tensor) -> tuple[int, int]:
    """Return the index of the first unit that this rank holds, and F; under tensor parallelism it holds a part."""
    if not hasattr(hidden_BTF, "device_mesh"):
        return 0, hidden_BTF.shape[-1]
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(
        hidden_BTF.shape,
        hidden_BTF.device_mesh,
        hidden_BTF.placements,  # type: ignore[attr-defined]
    )
    return offset[-1], hidden_BTF.shape[-1]
