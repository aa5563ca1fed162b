"""Seconds from the command to the first finished step, without set-up and data preparation.

    python -m benchmarks.startup [--repeats 5]

Runs ./run_train.sh with the debug recipe, once for set-up and preparation, then `--repeats` times for the measurement.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks.shared import ROOT, machine, spread


def seconds_to_first_step() -> float:
    with tempfile.TemporaryDirectory() as directory:
        metrics = Path(directory) / "metrics.jsonl"
        start = time.perf_counter()
        process = subprocess.Popen([ROOT / "run_train.sh", f"--run.dir={directory}"], stdout=subprocess.DEVNULL)
        try:
            while not (metrics.exists() and metrics.stat().st_size):
                if process.poll() is not None:
                    raise SystemExit(f"the run ended with status {process.returncode} before its first step")
                time.sleep(0.01)
            return time.perf_counter() - start
        finally:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    seconds_to_first_step()
    times = [seconds_to_first_step() for _ in range(arguments.repeats)]
    print(f"{machine()}; {arguments.repeats} starts")
    print(f"command to first step: {spread(times, '.2f')} s")


if __name__ == "__main__":
    main()
