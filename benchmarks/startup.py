"""Seconds from the command to the first finished step, without set-up and data preparation.

    python -m benchmarks.startup [--repeats 5] [--section.key=value ...]

Runs ./run_train.sh with the debug recipe, once for set-up and preparation, then `--repeats` times for the measurement,
in turn with a plain PyTorch script that takes one step of the same shape (benchmarks/bare_step.py).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.shared import ROOT, machine, spread


def seconds_to_first_step(extra: Sequence[str]) -> float:
    """Return the seconds of our recipe, with `extra` keys."""
    with tempfile.TemporaryDirectory() as directory:
        metrics = Path(directory) / "metrics.jsonl"
        start = time.perf_counter()
        process = subprocess.Popen(
            [str(ROOT / "run_train.sh"), f"--run.dir={directory}", *extra], stdout=subprocess.DEVNULL
        )
        try:
            while not (metrics.exists() and metrics.stat().st_size):
                if process.poll() is not None:
                    raise SystemExit(f"the run ended with status {process.returncode} before its first step")
                time.sleep(0.01)
            return time.perf_counter() - start
        finally:
            process.kill()
            process.wait()


def seconds_of_bare_step() -> float:
    """Return the seconds of the plain script, until it has printed its loss."""
    start = time.perf_counter()
    command = [sys.executable, str(ROOT / "benchmarks" / "bare_step.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise SystemExit("the plain script failed")
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    arguments, extra = parser.parse_known_args()
    seconds_to_first_step(extra)
    seconds_of_bare_step()
    pairs = [(seconds_to_first_step(extra), seconds_of_bare_step()) for _ in range(arguments.repeats)]
    ours, bare = zip(*pairs, strict=True)
    print(f"{machine()}; {arguments.repeats} starts of each, in turn")
    print(f"command to first step: {spread(ours, '.2f')} s; plain script {spread(bare, '.2f')} s")
    print(f"difference of a pair: {spread([one - other for one, other in pairs], '.2f')} s")


if __name__ == "__main__":
    main()
