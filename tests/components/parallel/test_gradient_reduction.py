"""When gradients are summed whole: by what they take on one rank."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from components.parallel.fsdp import LOCAL_SHARE, GradientReduction

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("tp", [1, 2])
def test_slices_are_of_matrices_and_experts_are_whole(tp):
    """20 numbers in a matrix, 60 in experts, at 4 bytes."""
    model = nn.Module()
    model.matrix, model.experts = nn.Parameter(torch.zeros(4, 5)), nn.Parameter(torch.zeros(3, 4, 5))
    needed = 4 * (20 // tp + 60)
    for device_memory, local in ((needed / LOCAL_SHARE + 1, True), (needed / LOCAL_SHARE - 1, False)):
        assert GradientReduction(model, "auto", tp=tp, device_memory=int(device_memory)).local == local
