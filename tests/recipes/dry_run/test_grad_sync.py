"""grad_sync = "auto": one rule, by the memory estimate, for a dry run and for a run."""

from __future__ import annotations

import pytest
import torch

from components.distributed.context import DistributedContext
from components.distributed.parallel_dims import MeshShape
from components.hardware import DeviceSpec, device_memory
from recipes.dry_run.memory import PLANNED_FRACTION, Memory, decide_grad_sync, syncs_once_per_step
from tests.recipes.dry_run.plans import config_of, plan_of

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(("mode", "expected"), [("once_per_step", (True, True)), ("every_micro_batch", (False, False))])
def test_an_explicit_mode_is_used_on_any_device(mode, expected):
    assert (syncs_once_per_step(mode, 10, 1), syncs_once_per_step(mode, 1, 10)) == expected


def test_auto_is_once_per_step_if_the_peak_fits_the_planned_fraction():
    assert syncs_once_per_step("auto", 900, 1000)
    assert not syncs_once_per_step("auto", 901, 1000)


def test_a_dry_run_uses_the_mode_of_each_device(tiny):
    plan = plan_of(tiny, "--run.device=auto", processes=2)
    memory = plan.memory
    assert isinstance(memory, Memory)
    assert memory.local_peak > memory.peak
    roomy, tight = (
        DeviceSpec("", 1.0, int(size / PLANNED_FRACTION) + add)
        for size, add in ((memory.local_peak, 2), (memory.peak, 2))
    )
    assert plan.peak_on(memory, roomy) == memory.local_peak
    assert plan.peak_on(memory, tight) == memory.peak


def test_once_per_step_adds_whole_weights_and_a_whole_float32_gradient(tiny):
    """8 bytes per parameter in float32, which include what is gathered at a time and the reduction of the head."""
    memory = plan_of(tiny, processes=2).memory
    assert isinstance(memory, Memory)
    added = memory.local_peak - memory.peak + memory.parts["weights in use"][0]
    assert 8 * memory.parameters <= added <= 8 * memory.parameters + 4 * 2 * 257 * 16 + 4 * 16


def test_a_run_takes_the_estimate_of_the_dry_run_and_the_memory_of_its_device(tiny):
    world = DistributedContext(0, 1, torch.device("cpu"))
    config = config_of(tiny)
    plan = plan_of(tiny, processes=2)
    assert decide_grad_sync(config.recipe, plan.model, MeshShape(1, 2, 1, 1), world, torch.float32)
    crowded = DistributedContext(
        0, 1, torch.device("cpu"), local_size=device_memory(world.device) // 10**6
    )  # a MB for each
    assert not decide_grad_sync(config.recipe, plan.model, MeshShape(1, 2, 1, 1), crowded, torch.float32)
    forced = config_of(tiny, "--training.grad_sync=once_per_step")
    assert decide_grad_sync(forced.recipe, plan.model, MeshShape(1, 2, 1, 1), crowded, torch.float32)


def test_a_model_that_cannot_be_estimated_takes_least_memory(tiny):
    class Peeking(torch.nn.Module):
        def forward(self, tokens, labels):
            return int(tokens.argmax())

    world = DistributedContext(0, 1, torch.device("cpu"))
    assert not decide_grad_sync(config_of(tiny).recipe, Peeking(), MeshShape(1, 2, 1, 1), world, torch.float32)
