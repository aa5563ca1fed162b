"""Runs of the comparison: started as a user starts them, measured from what they leave, remembered in one file."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.adaptive_batch.methods import SIZE, method_of, schedule
from benchmarks.measure import ROOT
from components.critical_batch import smoothed

Row = tuple[str, str]
"""A method and a schedule."""

POINTS = 200
"""Points of a loss curve that are kept."""


@dataclass(frozen=True)
class Job:
    """One run."""

    method: str
    schedule: str
    rate: float
    seed: int
    tokens: int


@dataclass
class Result:
    """What it left."""

    val_loss: float
    """Nats a token on held-out text at the end; infinite if the run failed."""
    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    curve: list[tuple[int, int, float, int]] | None = None
    """(step, tokens, smoothed training loss, batch). No text is seen twice, so the training loss is fair."""

    @property
    def mean_batch(self) -> float:
        return self.samples / self.steps

    def steps_to(self, loss: float) -> int | None:
        """The first step from which on the smoothed training loss is at most `loss`."""
        return next((step for step, _, smoothed, _ in self.curve or [] if smoothed <= loss), None)


class Book:
    """Results by job, kept in a file of JSON lines: what is in it is not run again, unless it was set up otherwise."""

    def __init__(self, path: Path, text: dict[str, str], final_tokens: int) -> None:
        self.path, self.text, self.final_tokens = path, text, final_tokens
        self._results: dict[Job, Result] = {}
        self._lock = threading.Lock()
        for line in path.read_text().splitlines() if path.exists() else []:
            entry = json.loads(line)
            job = Job(**entry["job"])
            if entry["settings"] == digest(job):
                self._results[job] = Result(**entry["result"])

    def finals(self, row: Row, tokens: int) -> list[Result]:
        """Results of the final runs of a row, by seed."""
        done = [job for job in self._results if (job.method, job.schedule) == row and job.tokens == tokens]
        return [self._results[job] for job in sorted(done, key=lambda job: job.seed)]

    def rows(self, tokens: int) -> dict[Row, float]:
        """Rows that have final runs, and their rate."""
        return {(job.method, job.schedule): job.rate for job in self._results if job.tokens == tokens}

    def run(self, job: Job) -> Result:
        """The result of `job`, from the file or from a run of minutes."""
        if job in self._results:
            return self._results[job]
        result = train(job, self.text)
        if job.tokens < self.final_tokens:
            result.curve = None  # of tuning, the loss at the end is what matters
        with self._lock:
            self._results[job] = result
            with self.path.open("a") as file:
                entry = {"job": asdict(job), "settings": digest(job), "result": asdict(result)}
                file.write(json.dumps(entry) + "\n")
        said = f"{job}: {result.val_loss:.4f} in {result.steps} steps, {result.seconds:.0f} s"
        print(said, file=sys.stderr, flush=True)
        return result


def settings_of(job: Job) -> dict[str, Any]:
    """The keys of a recipe that make a run what it is."""
    method = method_of(job.method)
    return {
        "run.seed": job.seed, "training.precision": "float32", "training.total_tokens": job.tokens, **SIZE,
        **method.settings, **schedule(job.schedule, job.rate, method), "gradient_moments.smoothing_samples": 500,
        "validation.interval_steps": "none", "validation.max_sequences": 512, "validation.micro_batch_size": 16,
    }  # fmt: skip


def digest(job: Job) -> str:
    return hashlib.sha256(json.dumps(settings_of(job), sort_keys=True).encode()).hexdigest()[:12]


def train(job: Job, text: dict[str, str]) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "run.name": "compared", "run.dir": Path(folder) / "run", "run.device": "cpu", **settings_of(job), **text,
            "checkpoint.interval_steps": "none", "metrics.tensorboard": "false",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, ROOT / "recipes", ROOT / "train_configs" / "own_text.toml",
             *(f"--{key}={value}" for key, value in settings.items())],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode == 2:
            raise SystemExit(f"{job}: {done.stderr}")
        metrics = Path(folder) / "run" / "metrics.jsonl"
        rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    if done.returncode:
        print(f"{job}: status {done.returncode}: {done.stderr[-300:]}", file=sys.stderr)
        return Result(math.inf)
    steps = [row for row in rows if "loss" in row]
    return Result(
        val_loss=rows[-1]["val_loss"],
        steps=len(steps),
        samples=steps[-1]["samples"],
        seconds=sum(row["step_seconds"] for row in steps),
        curve=curve_of(steps, job.tokens / 50),
    )


def curve_of(steps: list[dict[str, Any]], window: float) -> list[tuple[int, int, float, int]]:
    """The training loss averaged exponentially over `window` tokens, so that every batch size is smoothed alike."""
    taken = [
        later["tokens"] - earlier for later, earlier in zip(steps, [0, *(row["tokens"] for row in steps)], strict=False)
    ]
    losses = smoothed([row["loss"] for row in steps], taken, window)
    curve = [
        (row["step"], row["tokens"], round(loss, 5), row["global_batch_size"])
        for row, loss in zip(steps, losses, strict=True)
    ]
    every = max(1, math.ceil(len(curve) / POINTS))
    return curve[every - 1 :: every] + ([curve[-1]] if len(curve) % every else [])
