"""A step is launched without reading a number from a tensor: on a GPU each would be a wait for the device.

Counted on the CPU, where `item`, `float` and `bool` of a tensor go through one operation. tests/gpu has the same with
torch's own errors on a device.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from recipes.pretrain import Trainer

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal"}
"""Operations whose result, or its shape, is needed on the host."""
EXPERTS = ["--model.experts=4", "--model.top_k=2"]
ADAPTIVE = ["--batch.use=components.batch:NormTest", "--batch.initial_size=4", "--batch.max_size=40"]
ADAPTIVE += ["--batch.multiple_of=2", "--batch.eta=0.5"]
CASES = {
    "dense": [],
    "bf16": ["--training.precision=bf16"],
    "experts": EXPERTS,
    "experts, bf16, selective": [*EXPERTS, "--training.precision=bf16", "--training.activation_checkpoint=selective"],
    "adaptive": ADAPTIVE,
}


class Waits(TorchDispatchMode):
    """Counts operations that wait, but for those on the token ids, which are on the CPU on every machine."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._opname in WAITING and (not args or args[0].dtype != torch.int64):
            self.found[func._opname] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CASES)
def test_no_number_is_read_while_a_step_is_launched(tiny, monkeypatch, name):
    waits, launch = Waits(), Trainer.launch
    accumulate = []

    def watched(run, batch):
        before = run.step.accumulate

        def counted(*args, **kwargs):
            with waits:
                accumulate.append(1)
                return before(*args, **kwargs)

        run.step.accumulate = counted
        launch(run, batch)
        run.step.accumulate = before

    monkeypatch.setattr(Trainer, "launch", watched)
    monkeypatch.setattr("recipes.pretrain.metrics_delay", lambda *_: 1)
    keys = ["--validation=none", "--checkpoint.interval_steps=none", "--training.total_tokens=900"]
    assert tiny.launch(*keys, *CASES[name]) == 0
    assert accumulate and not waits.found


def test_the_count_sees_what_waits():
    with Waits() as waits:
        float(torch.ones(()))
        torch.ones(3).nonzero()
    assert waits.found == {"_local_scalar_dense": 1, "nonzero": 1}
