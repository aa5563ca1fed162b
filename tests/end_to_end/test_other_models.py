"""A custom model with weights shared between modules and parameters that get no gradient."""

from __future__ import annotations

import shutil

import pytest

from tests.end_to_end.endings import prepare
from tests.end_to_end.test_resume import assert_same_state, timeless

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

MODEL = '''
import torch
import torch.nn.functional as F
from torch import nn


class Tagger(nn.Module):
    """Knows a byte by the one before; `idle` is in no loss, `late` from the fourth step of four micro-batches on."""

    def __init__(self, vocab_size):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, 8)
        self.idle, self.late, self.frozen = nn.Linear(3, 3), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, vocab_size, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.double()

    def init_weights(self, seed):
        self.passes.zero_()
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)

    def forward(self, tokens, labels=None):
        x = self.embedding(tokens)
        if self.training:
            self.passes += 1
            if self.passes > 12:
                x = x + self.late(x)
        logits = self.head(self.frozen(x))
        if labels is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")

    def flops_per_token(self, sequence_length):
        return 1.0

    def lr_multiplier(self, name):
        return 1.0


class Model:
    def build(self, *, vocab_size, sequence_length):
        return Tagger(vocab_size)
'''


def test_a_resumed_run_equals_an_uninterrupted_one(tiny, tmp_path):
    (tiny.folder / "tagger.py").write_text(MODEL)
    other = ["--model.use=tagger:Model"]
    assert tiny.launch(*other) == 0
    rows = tiny.rows()
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0]
    assert all(row["grad_cov_trace"] > 0 for row in rows if "loss" in row)
    whole = tmp_path / "whole"
    tiny.directory.rename(whole)
    for stopped_at in (2, 5):  # before `late` has had a gradient, and after
        shutil.copytree(whole, tiny.directory)
        for later in range(stopped_at + 1, 15):
            shutil.rmtree(tiny.checkpoint(later))
        assert tiny.launch("--resume", "--checkpoint.interval_steps=none", *other) == 0
        assert timeless(tiny.rows()) == timeless(rows), f"resumed at {stopped_at}"
        assert_same_state(tiny.checkpoint(14), whole / "checkpoints" / "step-00000014")
        shutil.rmtree(tiny.directory)


def test_a_run_that_a_bad_sample_stopped_resumes_with_the_buffers_and_random_state_before_it(tiny, monkeypatch):
    """The step was computed without the sample, because other ranks would have waited."""
    prepare(tiny)
    drops = MODEL.replace("if self.training:", "x = F.dropout(x, 0.2, self.training)\n        if self.training:")
    (tiny.folder / "tagger.py").write_text(drops)
    keys = ["--model.use=tagger:Model", "--data.use=endings:Numbers", "--validation=none"]
    keys += ["--batch.use=components.batch:Constant", "--batch.initial_size=8", "--training.total_tokens=1152"]
    keys += ["--checkpoint.interval_steps=none"]
    assert tiny.launch(*keys) == 0
    rows, whole = tiny.rows(), tiny.folder / "whole"
    tiny.directory.rename(whole)
    monkeypatch.setenv("FAULT", "data: cannot be read")  # in the fourth step of six
    assert tiny.launch(*keys) == 2
    monkeypatch.delenv("FAULT")
    assert tiny.launch("--resume", *keys) == 0
    assert timeless(tiny.rows()) == timeless(rows)
    assert_same_state(tiny.checkpoint(6), whole / "checkpoints" / "step-00000006")
