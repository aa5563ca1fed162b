"""Storage for a model that was built on the meta device."""

from __future__ import annotations

import torch
from torch import nn


def give_storage(model: nn.Module, device: torch.device) -> None:
    """`to_empty` on `device`, and a parameter that modules share stays one: torch makes one for each of them."""
    uses: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            uses.setdefault(id(parameter), []).append((module, name))
    model.to_empty(device=device)
    for (owner, own_name), *others in uses.values():
        for module, name in others:
            module.register_parameter(name, owner.get_parameter(own_name))
