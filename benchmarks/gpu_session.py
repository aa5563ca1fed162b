"""Everything that a GPU should show, in one command with a time limit and one file of results.

    python -m benchmarks.gpu_session [--minutes 9] [--output runs/gpu_session.json]

The parts, in this order: the tests that need a GPU (no step synchronizes, equality with the CPU, bitwise resume), the
published recipes against a plain loop (`benchmarks.gpu_throughput`), a profile of a step and the stall of a checkpoint,
both at 300M parameters. Each runs in a separate process; a part that fails or reaches its time limit does not stop the
others. The file is written after every part. --smoke runs the parts on a CPU in tiny shapes, to show that they run.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_throughput import interrupt, kill_group
from benchmarks.shared import DEBUG, ROOT, machine

LARGE = [
    "--model.dim=1024", "--model.layers=20", "--model.heads=16", "--model.kv_heads=16", "--model.head_dim=64",
    "--model.ffn_dim=2816", "--training.sequence_length=2048", "--training.precision=bf16",
]  # fmt: skip
"""The debug recipe with 300M parameters: its text is part of the project."""
SMALL = ["--model.dim=64", "--model.layers=2", "--model.heads=2", "--model.kv_heads=2", "--model.ffn_dim=96"]
SHORT = ["--run.if_exists=replace", "--validation=none", "--lr_schedule.warmup_tokens=0"]
TAIL = 6_000
"""Characters kept of the output of a part: its end, where the tables are."""


@dataclass
class Part:
    """A part of the session and its result."""

    name: str
    command: list[str]
    """Arguments of Python."""
    limit: float
    """Seconds."""
    results: Path | None = None
    """A JSON file that the command writes."""
    status: int | None = None
    """Exit status; None if it did not end within its limit or was not started."""
    seconds: float = 0.0
    output: str = ""
    measured: Any = None
    """The content of `results`."""


def parts(directory: Path, *, smoke: bool) -> list[Part]:
    """Return the parts, with limits that add up to nine minutes."""
    throughput = directory / "throughput.json"
    shape = SMALL if smoke else LARGE
    sample = 256 if smoke else 2048
    tokens = [f"--training.total_tokens={8 * 12 * sample}", "--batch.initial_size=8"]
    shape = ["--training.micro_batch_size=4", *shape]
    quick = ["--smoke", "--models=300M", "--kinds=eager", "--steps=5"] if smoke else ["--steps=10", "--minutes=4.8"]
    profile = ["--profile.steps=2", "--profile.start_step=8", "--checkpoint.interval_steps=none", *SHORT, *shape]
    stall = ["--repeats=1", "--saves=2" if smoke else "--saves=3", *shape, "--validation=none"]
    return [
        Part("tests", ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu", "tests/models"], 120),
        Part(
            "throughput", ["-m", "benchmarks.gpu_throughput", *quick, f"--output={throughput}"], 300, results=throughput
        ),
        Part("profile", ["-m", "recipes", str(DEBUG), f"--run.dir={directory / 'profile'}", *profile, *tokens], 60),
        Part("checkpoint stall", ["-m", "benchmarks.checkpoint_stall", *stall], 60),
    ]


def run_part(part: Part, limit: float) -> None:
    """Run a part for at most `limit` seconds and record its result."""
    started = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            [sys.executable, *part.command], cwd=ROOT, stdout=output, stderr=output, start_new_session=True
        )
        try:
            part.status = process.wait(limit)
        except subprocess.TimeoutExpired:
            pass
        finally:
            kill_group(process)
            part.seconds = time.monotonic() - started
            output.seek(0)
            part.output = output.read()[-TAIL:]
            if part.results is not None and part.results.exists():
                part.measured = json.loads(part.results.read_text(encoding="utf-8"))


def outcome(part: Part) -> str:
    """Return a line for the console."""
    if part.status is None:
        return f"{part.name}: stopped after {part.seconds:.0f} s" if part.seconds else f"{part.name}: no time left"
    last = (part.output.strip().splitlines() or [""])[-1]
    return f"{part.name}: status {part.status} after {part.seconds:.0f} s: {last}"


def main(arguments: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_session",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=9, help="time limit of all parts together")
    parser.add_argument("--output", type=Path, default=Path("runs") / "gpu_session.json")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, also without a GPU")
    options = parser.parse_args(arguments)
    if not (options.smoke or torch.cuda.is_available()):
        print("no CUDA device is available; --smoke runs the same parts on the CPU, in tiny shapes", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, interrupt)  # sent at the time limit of a job: the part that runs is stopped
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        session = parts(Path(directory), smoke=options.smoke)
        try:
            for part in session:
                left = started + 60 * options.minutes - time.monotonic()
                if left > 0:
                    run_part(part, min(left, part.limit))
                print(outcome(part), flush=True)
                save(session, options.output)
        except KeyboardInterrupt:
            save(session, options.output)
            return 130
    print(f"\nAll results: {options.output}")
    return int(any(part.status != 0 for part in session))


def save(session: Sequence[Part], output: Path) -> None:
    about = {"machine": machine(), "parts": [asdict(part) for part in session]}
    output.write_text(json.dumps(about, indent=1, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
