"""Activation checkpointing keeps what its mode says, and its memory estimate counts the same operations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from components.activation_checkpointing import OPS_TO_SAVE, apply_activation_checkpointing
from recipes.dry_run.activation_memory import count_activations

pytestmark = pytest.mark.quick

BATCH, LENGTH, DIM, HIDDEN, LAYERS = 2, 6, 8, 12, 3


class BiasedBlock(nn.Module):
    """A feed-forward block whose projections have biases, so that they are `addmm` and not `mm`."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.silu(self.up(x)))


class BiasedModel(nn.Module):
    """An embedding and blocks with biases, with the sum of the outputs as its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, DIM)
        self.layers = nn.ModuleDict({str(i): BiasedBlock() for i in range(LAYERS)})

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.layers.values():
            x = block(x)
        return x.sum()


class OpCounter(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func._opname] = self.counts.get(func._opname, 0) + 1
        return func(*args, **(kwargs or {}))


def counted_step(mode) -> tuple[dict[str, int], dict[str, int], list[Tensor]]:
    """Operations of the forward and of the backward pass, and the gradients."""
    torch.manual_seed(0)
    model = BiasedModel()
    apply_activation_checkpointing(model.layers.values(), mode)
    tokens = torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH)
    with OpCounter() as forward:
        loss = model(tokens, tokens)
    with OpCounter() as backward:
        loss.backward()
    return forward.counts, backward.counts, [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize(
    ("mode", "addmm", "silu"),
    [("none", 0, 0), ("full", 2 * LAYERS, LAYERS), (3, 2, 1), (4, 0, 0), ("selective", 0, LAYERS)],
)
def test_the_backward_pass_recomputes_what_the_mode_says(mode, addmm, silu):
    """Non-reentrant checkpointing stops recomputing at the last tensor that backward needs: a product may be left."""
    forward, backward, gradients = counted_step(mode)
    assert forward["addmm"] == 2 * LAYERS
    assert backward.get("silu", 0) == silu
    recomputed = backward.get("addmm", 0)
    assert recomputed in ((addmm, addmm - silu) if addmm else (0,))
    assert all(map(torch.equal, gradients, counted_step("none")[2]))


def test_the_run_and_its_memory_estimate_save_the_same_operations():
    """With biases every product is an `addmm`; the run must not recompute it, and the estimate must count it."""
    _, backward, _ = counted_step("selective")
    _, plain, _ = counted_step("none")
    assert {name: backward.get(name, 0) - plain.get(name, 0) for name in OPS_TO_SAVE} == dict.fromkeys(OPS_TO_SAVE, 0)
    with torch.device("meta"):
        model = BiasedModel()
    names = [f"layers.{i}" for i in range(LAYERS)]
    activations = count_activations(
        model, names, micro_batch_size=BATCH, sequence_length=LENGTH, compute_dtype=torch.float32
    )
    assert [block.saved_ops for block in activations.blocks] == [4 * BATCH * LENGTH * (HIDDEN + DIM)] * LAYERS
