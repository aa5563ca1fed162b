"""Kill a node of an elastic run at a random step, bring it back, and compare the run with an undisturbed one.

    python -m benchmarks.torture.nodes [--kills 20] [--seed 0]

Two nodes of two processes each, on this machine, train with an adaptive batch; the nodes meet at a process of its own
(tools/rendezvous.py). All processes of a node get SIGKILL at once; the node is started again when the other one has
continued. Every run must have the steps, samples and batches of an undisturbed run of one process, and its losses
within 1e-5. The table has what the loss of a node costs: steps that are trained again, and seconds without progress.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.shared import ROOT, machine, repeat_with, spread
from benchmarks.torture.killed_run import free_port
from benchmarks.torture.kinds import make_recipe
from components.metrics.jsonl import read_rows

SETTINGS = [
    "--batch.use=components.batch:NormTest", "--batch.initial_size=8", "--batch.max_size=24",
    "--training.total_tokens=30K", "--batch.eta=0.7", "--batch.shrink=true", "--batch.multiple_of=8",
    "--gradient_noise.smoothing_samples=20", "--lr_schedule.max_lr=1e-2",
    "--training.grad_sync=once_per_step", "--model.use=paced:Paced", "--model.size=debug", "--model.dim=16",
    "--model.layers=2", "--model.heads=2", "--model.kv_heads=1", "--model.head_dim=8", "--model.ffn_dim=32",
]  # fmt: skip
"""A multiple of 8 samples is whole micro-batches of two, on two and on four processes."""
PACED = '''
"""A Llama whose passes take PACE seconds longer."""

import os
import time

from models.llama import Llama


class Paced(Llama):
    def build(self, **sizes):
        model = super().build(**sizes)
        forward = model.forward

        def paced(*args, **kwargs):
            time.sleep(float(os.environ.get("PACE", "0")))
            return forward(*args, **kwargs)

        model.forward = paced
        return model
'''
NODES = ("127.0.0.1", "127.0.0.2")
_TIMEOUT_SECONDS = 300.0


class ElasticRun:
    """One run of two nodes, of which one is lost and comes back."""

    def __init__(self, recipe: Path, directory: Path, node_timeout: int) -> None:
        self.recipe, self.directory = recipe, directory
        self.environment = {
            "NNODES": "1:2", "NPROC": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
            "NODE_RANK": "1", "NODE_TIMEOUT": str(node_timeout), "JOIN_AFTER": "0",
            "OMP_NUM_THREADS": "1", "PACE": "0.1",
        }  # fmt: skip
        self.log = directory.with_suffix(".log").open("a")
        self.rendezvous = subprocess.Popen(
            [sys.executable, "-m", "tools.rendezvous", "--port", self.environment["MASTER_PORT"]],
            cwd=ROOT, stdout=self.log, stderr=self.log,
        )  # fmt: skip

    def start(self, node: int) -> subprocess.Popen[bytes]:
        """Start the launcher of a node."""
        command: list[Any] = [sys.executable, ROOT / "recipes", self.recipe, f"--run.dir={self.directory}", *SETTINGS]
        environment = {**os.environ, **self.environment, "NODE_ADDR": NODES[node]}
        return subprocess.Popen(command, env=environment, stdout=self.log, stderr=self.log)

    def lose_a_node(self, rng: random.Random) -> list[dict[str, Any]]:
        """Kill one node after a random step, start it again, and return all rows of metrics at the end."""
        try:
            launchers = [self.start(node) for node in range(2)]
            victim, at = rng.randrange(2), rng.randint(1, 25)
            self.wait_for_step(at)
            kill_all(launchers[victim].pid)
            launchers[victim].wait()
            self.wait_for_step(at + rng.randint(2, 6), since_restart=True)
            launchers[victim] = self.start(victim)
            statuses = [launcher.wait(_TIMEOUT_SECONDS) for launcher in launchers]
            assert statuses == [0, 0], f"statuses {statuses}; see {self.log.name}"
            return read_rows(self.directory / "metrics.jsonl")
        finally:
            self.rendezvous.kill()
            self.rendezvous.wait()

    def wait_for_step(self, step: int, *, since_restart: bool = False) -> None:
        def reached() -> bool:
            rows = read_rows(self.directory / "metrics.jsonl")
            restarted = not since_restart or any("restart_processes" in row for row in rows)
            return restarted and any(row["step"] >= step for row in rows)

        _wait(reached)


def kill_all(process: int) -> None:
    """Kill a process and all that it started, at once, as the failure of a machine does."""
    everything = list(processes_below(process))
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for each in everything:
            os.kill(each, number)


def largest_difference(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> float:
    """Return the largest relative difference of a loss. Raises AssertionError if steps, samples or batches differ."""
    found, wanted = ([row for row in each if "loss" in row] for each in (rows, expected))
    for key in ("step", "samples", "global_batch_size"):
        assert [row[key] for row in found] == [row[key] for row in wanted], key
    return max(abs(row["loss"] / other["loss"] - 1) for row, other in zip(found, wanted, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--node-timeout", type=int, default=15, help="seconds until a node is lost")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        recipe = make_recipe(folder)
        (folder / "paced.py").write_text(PACED, encoding="utf-8")
        alone = folder / "alone"
        command: list[Any] = [sys.executable, ROOT / "recipes", recipe, f"--run.dir={alone}", *SETTINGS]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # also prepares the text
        expected = read_rows(alone / "metrics.jsonl")
        batches = sorted({row["global_batch_size"] for row in expected if "loss" in row})
        differences, steps, seconds = [], [], []
        for number in range(arguments.kills):
            rows = ElasticRun(recipe, folder / f"run-{number}", arguments.node_timeout).lose_a_node(rng)
            differences.append(largest_difference(rows, expected))
            lost = next(row for row in rows if "restart_processes" in row)
            steps.append(lost["restart_lost_steps"])
            seconds.append(lost["restart_seconds"])
            print(f"{number + 1}: difference {differences[-1]:.1e}, {steps[-1]} steps, {seconds[-1]:.0f} s", flush=True)
            assert differences[-1] <= 1e-5
    print(f"\n{machine()}; batches of {batches} samples, a checkpoint every 3 steps\n")
    print("| nodes killed | largest difference of a loss | steps trained again | seconds without progress |")
    print("|---|---|---|---|")
    print(f"| {arguments.kills} | {max(differences):.1e} | {statistics.mean(steps):.1f} | {spread(seconds, '.0f')} |")
    print(repeat_with("benchmarks.torture.nodes"))


def processes_below(parent: int) -> Iterator[int]:
    """Yield a process and those that it started."""
    yield parent
    for task in Path(f"/proc/{parent}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from processes_below(int(child))


def _wait(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while not reached():
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.05)


if __name__ == "__main__":
    main()
