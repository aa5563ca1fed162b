"""Components of a recipe that fail at the fourth step, or in the validation before it, as the environment asks."""

from __future__ import annotations

from tests.conftest import TinyRun

MODULE = '''
import os
from dataclasses import dataclass

import torch

from components.batch import Constant
from components.lr_schedules import WSD
from models.llama import Llama


def fails(what):
    return os.environ.get("FAULT") == what and os.environ.get("RANK", "0") == os.environ.get("FAULT_RANK", "0")


def in_order(samples):
    return samples // 1000, samples % 1000


class Samples:
    """Sequence i is global sample i, so that the fourth step of eight reads the samples 24 to 31."""

    def __init__(self, length, held_out):
        self.length, self.held_out = length, held_out

    def __len__(self):
        return 1000

    def order(self, *, seed):
        return in_order

    def __getitem__(self, index):
        ids = (torch.arange(self.length + 1) * (index + 3)) % 200
        bad = os.environ.get("BAD_SAMPLES", "24" if not self.held_out else "0").split(",")
        if str(index) in bad:
            where = "validation" if self.held_out else "data"
            if fails(f"{where}: cannot be read"):
                raise OSError(5, "Input/output error", "/data/shard-7.bin")
            if fails(f"{where}: no such id"):
                ids[3] = 70_000
            if fails(f"{where}: a bug"):
                raise KeyError("text")
            if fails(f"{where}: another length"):
                return ids[:-1]
        return ids


@dataclass(kw_only=True)
class Numbers:
    held_out: bool = False

    def build(self, *, tokenizer, sequence_length, cache_dir, progress):
        return Samples(sequence_length, self.held_out)


@dataclass(frozen=True, kw_only=True)
class Schedule(WSD):
    def lr(self, tokens, batch_tokens, total_tokens):
        if tokens >= 3 * 8 * 24 and os.environ.get("FAULT", "").startswith("schedule: "):
            gives = os.environ["FAULT"].removeprefix("schedule: ")
            return {"raises": lambda: {}["x"], "none": lambda: None}.get(gives, lambda: float(gives))()
        return super().lr(tokens, batch_tokens, total_tokens)


@dataclass(frozen=True, kw_only=True)
class Policy(Constant):
    def next_batch_size(self, progress):
        if progress.samples >= 24:
            if fails("policy: no batch"):
                return 0
            if fails("policy: raises"):
                raise ZeroDivisionError("division by zero")
        return super().next_batch_size(progress)

    def observe(self, progress, noise):
        if progress.samples >= 24 and fails("policy: observe"):
            raise ZeroDivisionError("division by zero")
        super().observe(progress, noise)


@dataclass(kw_only=True)
class Model(Llama):
    def build(self, **sizes):
        model = super().build(**sizes)
        forward, calls = model.forward, [0]

        def failing(tokens, labels=None):
            out = forward(tokens, labels)
            if labels is not None and model.training:
                calls[0] += 1
                if calls[0] == 14 and fails("model: crash"):
                    raise ArithmeticError("in the fourth step")
                if calls[0] == 14 and fails("model: memory"):
                    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
                if calls[0] == 14 and fails("model: nan"):
                    out = out * float("nan")
            return out

        model.forward = failing
        return model
'''
ARGUMENTS = ["--model.use=endings:Model", "--model.size=debug", "--model.dim=16", "--model.layers=2"]
ARGUMENTS += ["--model.heads=2", "--model.kv_heads=1", "--model.head_dim=8", "--model.ffn_dim=32"]
ARGUMENTS += ["--data.use=endings:Numbers", "--validation.data.use=endings:Numbers"]
ARGUMENTS += ["--validation.data.held_out=true", "--validation.interval_steps=3"]
ARGUMENTS += ["--lr_schedule.use=endings:Schedule", "--lr_schedule.max_lr=1e-2", "--lr_schedule.warmup_tokens=300"]
ARGUMENTS += ["--batch.use=endings:Policy", "--batch.initial_size=8", "--training.total_tokens=1152"]
"""Six steps of eight samples: four micro-batches of two on one process."""


def prepare(tiny: TinyRun) -> TinyRun:
    (tiny.folder / "endings.py").write_text(MODULE)
    return tiny
