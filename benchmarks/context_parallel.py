"""Step time and peak memory of a rank by sequence length, with the sequence cut among 1, 2 and 4 processes.

    python -m benchmarks.context_parallel [--lengths 4096 16384 65536] [--processes 1 2 4] [--section.key=value ...]

A tiny decoder trains on one sequence of random ids in each step, on the CPU with gloo and one thread per process unless
--run.device=cuda is given. With more processes than cores the time measures the sharing of cores; the memory is valid
nevertheless.
"""

from __future__ import annotations

import argparse
import os

from benchmarks.measured_run import Measurements, measure_run
from benchmarks.shared import DEBUG, machine, repeat_with

WARM_UP = 1
SETTINGS = {
    "model.dim": 64, "model.layers": 2, "model.heads": 2, "model.kv_heads": 1, "model.ffn_dim": 192,
    "model.max_sequence_length": 2**20,
    "tokenizer.use": "components.tokenizers:Bytes", "training.micro_batch_size": 1, "validation": "none",
    "data.use": "benchmarks.shared:RandomTokens", "data.sequences": 4,
}  # fmt: skip
"""0.1M parameters: nearly all of the memory is that of activations."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 65536], help="in tokens")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=2, help=f"measured steps, after {WARM_UP} of warm-up")
    arguments, extra = parser.parse_known_args()
    print(f"{machine()}, {os.cpu_count()} cores; medians (lowest to highest) of {arguments.steps} steps and of ranks\n")
    print(
        "| tokens | cp | s per step | peak MiB of a rank | grown since its start |\n|---|---|---|---|---|", flush=True
    )
    for length in arguments.lengths:
        for processes in arguments.processes:
            row = Measurements()
            measure_run(
                row, processes, DEBUG, SETTINGS, [f"--parallel.cp={processes}", *extra],
                batch=1, steps=arguments.steps, warm_up=WARM_UP, sequence_length=length,
            )  # fmt: skip
            print(f"| {length:,} | {processes} | {' | '.join(row.cells())} |", flush=True)
    print(repeat_with("benchmarks.context_parallel"))


if __name__ == "__main__":
    main()
