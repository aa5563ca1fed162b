"""A model from the meta device, with storage."""

from __future__ import annotations

import torch
from torch import nn

from recipes.parallelize import materialize


def test_a_parameter_that_modules_share_stays_one():
    with torch.device("meta"):
        model = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5)})
        model["head"].weight = model["embedding"].weight
        again = model["again"] = nn.Linear(3, 5)
        again.weight, again.bias = model["embedding"].weight, model["head"].bias
    names = [name for name, _ in model.named_parameters()]
    materialize(model, torch.device("cpu"))
    assert model["embedding"].weight is model["head"].weight is again.weight
    assert model["head"].bias is again.bias
    assert [name for name, _ in model.named_parameters()] == names
    assert all(not parameter.is_meta and parameter.requires_grad for parameter in model.parameters())
