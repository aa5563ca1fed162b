"""A step is launched without reading a number from a tensor: on a GPU each would be a wait for the device.

tests/distributed/test_collectives.py has the same on every layout, tests/gpu with torch's own errors on a device.
"""

from __future__ import annotations

import json

import pytest
import torch

from models import decoder
from models.attention import causal_attention
from models.flex_attention import FlexAttention
from tests.models.test_document_attention import uncompiled
from tests.waiting import LAUNCH, Waits

EXPERTS = ["--model.experts=4", "--model.top_k=2"]
ADAPTIVE = ["--batch.use=components.batch:NormTest", "--batch.initial_size=4", "--batch.max_size=40"]
ADAPTIVE += ["--batch.multiple_of=2", "--batch.eta=0.5"]
AVERAGES = ["--average.ema.use=components.average:Exponential", "--average.ema.half_life_tokens=500"]
AVERAGES += ["--average.w.use=components.average:Window", "--average.w.window_tokens=800"]
CASES = {
    "dense": [],
    "bf16": ["--training.precision=bf16"],
    "experts": EXPERTS,
    "experts, bf16, selective": [*EXPERTS, "--training.precision=bf16", "--training.activation_checkpoint=selective"],
    "adaptive": ADAPTIVE,
    "Muon, averages": ["--optimizer.use=components.optimizers:Muon", "--optimizer.variant=normuon", *AVERAGES],
    "documents": ["--training.document_masking=true"],
}


def attend_to_all(_, q, k, v, rule):
    return causal_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), rule)


@pytest.mark.parametrize("name", CASES)
def test_no_number_is_read_while_a_step_is_launched(tiny, monkeypatch, name):
    monkeypatch.setattr("recipes.pretrain.metrics_delay", lambda *_: 1)
    if name == "documents":  # with the masks of a GPU, whose kernel a dispatch mode cannot enter on a CPU
        monkeypatch.setattr(decoder, "attention_backends", uncompiled)
        monkeypatch.setattr(FlexAttention, "attend", attend_to_all)
    notes = tiny.folder / "waits.json"
    keys = ["--validation=none", "--checkpoint.interval_steps=none", "--training.total_tokens=900"]
    keys += ["--hooks.waits.use=tests.waiting:CountWaits", f"--hooks.waits.notes={notes}"]
    assert tiny.launch(*keys, *CASES[name]) == 0
    launches, waits = json.loads(notes.read_text())
    assert launches >= 2 * len(LAUNCH)
    assert waits == {}


def test_the_count_sees_what_waits():
    ones = torch.ones(3)
    with Waits() as waits:
        float(ones[0]), bool(ones[0]), int(ones[0].long()), ones[0].item()
        ones.nonzero(), ones.tolist(), ones.cpu(), ones.numpy()
        torch.tensor([1.0], device=ones.device)
        torch.tensor([1.0]), ones + 1, ones.to(ones.device, non_blocking=True)  # none of these
    found = {name.split()[0]: count for name, count in waits.found.items()}
    assert found == {"_local_scalar_dense": 4, "nonzero": 1, "tolist": 1, "cpu": 1, "numpy": 1, "tensor": 1}
    assert all("test_waiting.py" in name for name in waits.found)
