"""Runs that cost nothing: what they leave, written down."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from components.quantities import parse_count
from tools.sweep.runs import Runner

LENGTH, BATCH = 128, 32


def pretend(monkeypatch, loss: Callable[[Mapping[str, str]], float], status: int = 0, said: str = "") -> list[dict]:
    """Every run leaves `loss(settings)`, and the settings are listed; it ends with `status`."""
    launched: list[dict] = []

    def launch(self: Runner, recipe: Path, settings: Mapping[str, str]) -> tuple[int, str]:
        launched.append(dict(settings))
        folder = Path(settings["run.dir"])
        folder.mkdir(parents=True)
        batch = int(settings.get("batch.initial", BATCH))
        steps = -(-parse_count(settings.get("training.total_tokens", "1M")) // (batch * LENGTH))
        rows = [
            {"step": steps, "samples": steps * batch, "tokens": steps * batch * LENGTH, "loss": loss(settings) + 0.1,
             "global_batch_size": batch, "step_seconds": 2.0},
            {"step": steps, "tokens": steps * batch * LENGTH, "val_loss": loss(settings)},
        ]  # fmt: skip
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return status, said

    monkeypatch.setattr(Runner, "_launch", launch)
    return launched
