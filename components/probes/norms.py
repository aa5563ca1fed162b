"""Norms of the gradients, the parameters and the updates of every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from components.gradient_noise.norms import local_part
from components.probes.groups import group_of
from components.probes.probed_step import ProbedStep
from components.units import PositiveCount


@dataclass(frozen=True, kw_only=True)
class Norms:
    """Norms of the gradient before clipping, of the parameters before the update, and of the update, of each layer, and
    the ratio of the last two. The update is the exact difference of the parameters, whatever the optimizer."""

    interval_steps: PositiveCount = 100
    """Steps between two measurements; the first step is measured."""
    by_module: bool = False
    """Report the modules of a layer, such as attention and feed_forward, instead of the whole layer."""

    def on_gradients(self, step: ProbedStep) -> None:
        for name, parameter in step.parameters.items():
            if parameter.grad is not None:
                step.record_norm(f"grad_norm_{group_of(name, by_module=self.by_module)}", parameter.grad)
            step.record_norm(f"param_norm_{group_of(name, by_module=self.by_module)}", parameter)
        # one copy of the local shards, until the update
        step.scratch["before"] = {
            name: local_part(parameter.detach())[1].clone()
            for name, parameter in step.parameters.items()
            if parameter.requires_grad
        }

    def on_update(self, step: ProbedStep) -> None:
        before = step.scratch.pop("before")
        copies, after = zip(*(local_part(step.parameters[name].detach()) for name in before), strict=True)
        updates = list(before.values())
        torch._foreach_sub_(updates, list(after))  # in place; the sign does not matter
        for name, update, held in zip(before, updates, copies, strict=True):
            step.record_norm(f"update_norm_{group_of(name, by_module=self.by_module)}", update, copies=held)

    def finish(self, step: ProbedStep, values: Mapping[str, Any]) -> Mapping[str, float]:
        ratios = {}
        for name, update in values.items():
            quantity, _, group = name.partition("_norm_")
            if quantity == "update" and (parameter := values[f"param_norm_{group}"]):
                ratios[f"update_ratio_{group}"] = update / parameter
        return {**values, **ratios}
