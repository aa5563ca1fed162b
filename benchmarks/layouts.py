"""Step time and peak memory of every rank, by number of processes and parallel layout.

    python -m benchmarks.layouts [--repeats 2] [--steps 10] [--config my.toml] [--section.key=value ...]

Each run is started by ./run_train.sh, with one thread per process, on the CPU with gloo unless --run.device=cuda is
given. The layouts take turns and train on the same samples in the same steps. With more processes than cores the time
measures the sharing of cores, not the layout; the memory is valid nevertheless.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks.measured_run import Measurements, measure_run
from benchmarks.shared import DEBUG, machine, repeat_with

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one process": (1, []),
    "2 replicas": (2, ["--parallel.dp_replicate=2"]),
    "2 shards": (2, []),
    "2 TP shards": (2, ["--parallel.tp=2"]),
    "2 CP ranks": (2, ["--parallel.cp=2"]),
    "4 shards": (4, []),
    "2 replicas of 2 shards": (4, ["--parallel.dp_replicate=2"]),
    "2 shards of 2 TP shards": (4, ["--parallel.tp=2"]),
}
"""Name -> processes, arguments."""
WARM_UP = 3
BATCH = 8
SHAPE = {
    "model.dim": 512, "model.layers": 8, "model.heads": 8, "model.kv_heads": 8, "model.ffn_dim": 1536,
    "training.micro_batch_size": 2, "validation.interval_steps": "none", "validation.max_sequences": 1,
}  # fmt: skip
"""32M parameters, 0.5 GB with gradients and moments. The imports of a device mesh alone take about 0.1 GB."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10, help=f"measured steps, after {WARM_UP} of warm-up")
    parser.add_argument("--sequence-length", type=int, default=128, help="in tokens")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--config", type=Path, default=DEBUG)
    arguments, extra = parser.parse_known_args()
    arguments.config = arguments.config.resolve()
    rows = {name: Measurements() for name in arguments.layouts}
    for _ in range(arguments.repeats):
        for name, row in rows.items():
            if not row.failure:
                processes, layout = LAYOUTS[name]
                measure_run(
                    row, processes, arguments.config, SHAPE, [*layout, *extra],
                    batch=BATCH, steps=arguments.steps, warm_up=WARM_UP, sequence_length=arguments.sequence_length,
                )  # fmt: skip
                print(f"{name}: {row.failure or 'measured'}", file=sys.stderr, flush=True)
    print(f"\n{machine()}, {os.cpu_count()} cores; {BATCH} x {arguments.sequence_length} tokens per step, ", end="")
    print(f"{arguments.steps} steps in each of {arguments.repeats} runs;")
    print("medians (lowest to highest), of steps and of ranks\n")
    print("| layout | processes | s per step | peak MiB of a rank | grown since its start |\n|---|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {LAYOUTS[name][0]} | {' | '.join(row.cells())} |")
    print(repeat_with("benchmarks.layouts"))


if __name__ == "__main__":
    main()
