"""Fake runs: only their results are written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from components.units import parse_count
from tools.sweep.grid import Job
from tools.sweep.runner import Runner

LENGTH, BATCH = 128, 32


def highest_rate(settings: Mapping[str, str]) -> float:
    """Return the learning rate of WSD, with linear batch scaling if there is a reference."""
    rate = float(settings.get("lr_schedule.max_lr", 1.0))
    reference = int(settings.get("lr_schedule.reference_batch_tokens", 0))
    return rate * int(settings.get("batch.initial_size", BATCH)) * LENGTH / reference if reference else rate


def pretend(
    monkeypatch,
    loss: Callable[[Mapping[str, str]], float],
    status: int = 0,
    said: str = "",
    lr: Callable[[Mapping[str, str]], float] = highest_rate,
    error: dict | None = None,
    noise: Callable[[int], float] | None = None,
    length: int = LENGTH,
) -> list[dict]:
    """Let every run report `loss(settings)` and `lr(settings)` and end as given; return the list of settings.

    With `noise` it also reports this noise scale, in samples, after 20 numbers of tokens.
    """
    launched: list[dict] = []

    def launch(self: Runner, job: Job, settings: Mapping[str, str]) -> tuple[int, str, dict | None]:
        launched.append(dict(settings))
        folder = Path(settings["run.dir"])
        folder.mkdir(parents=True)
        batch = int(settings.get("batch.initial_size", BATCH))
        steps = -(-parse_count(settings.get("training.total_tokens", "1M")) // (batch * length))
        logged = [steps] if noise is None else sorted({max(1, steps * part // 20) for part in range(1, 21)})
        rows = [
            {"step": step, "samples": step * batch, "tokens": step * batch * length, "loss": loss(settings) + 0.1,
             "global_batch_size": batch, "step_seconds": 2.0, "lr": lr(settings),
             "noise_scale": None if noise is None else noise(step * batch * length)}
            for step in logged
        ]  # fmt: skip
        rows.append({"step": steps, "tokens": steps * batch * length, "val_loss": loss(settings)})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return status, said, error

    monkeypatch.setattr(Runner, "_launch", launch)
    return launched
