"""Kill a node of an elastic run at a random step, bring it back, and compare the run with an undisturbed one.

    python -m benchmarks.torture.nodes [--kills 20] [--seed 0] [--namespaces] [--section.key=value ...]

Two nodes of two processes each, on this machine or in two network namespaces of it, train with an adaptive batch; the
rendezvous is a separate process (tools/rendezvous.py). All processes of a node get SIGKILL at once; the node is
started again when the other one has continued. Every run must have the steps, samples and batches of an undisturbed run
of one process, and its losses within 1e-5. The table has what the loss of a node costs: steps that are trained again,
and seconds without progress.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.shared import ROOT, machine, repeat_with, spread
from benchmarks.torture.kinds import make_recipe
from benchmarks.torture.virtual_network import HOSTS, Network, why_impossible
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
"""A Llama whose passes take PACE seconds longer, with PACED_WHILE as long as that file exists."""

import os
import time

from models.llama import Llama


class Paced(Llama):
    def build(self, **sizes):
        model = super().build(**sizes)
        forward = model.forward

        def paced(*args, **kwargs):
            if os.path.exists(os.environ.get("PACED_WHILE", "/")):
                time.sleep(float(os.environ.get("PACE", "0")))
            return forward(*args, **kwargs)

        model.forward = paced
        return model
'''
NODES = ("127.0.0.1", "127.0.0.2")
_TIMEOUT_SECONDS = 300.0


class ElasticRun:
    """One run of two nodes, of which one is lost and comes back."""

    def __init__(
        self, recipe: Path, directory: Path, settings: list[str], node_timeout: int, network: Network | None
    ) -> None:
        self.recipe, self.directory, self.settings, self.network = recipe, directory, settings, network
        self.log = directory.with_suffix(".log")
        self.launchers: list[subprocess.Popen[bytes]] = []
        self.rendezvous = subprocess.Popen(
            [*self.on(0), sys.executable, "-m", "tools.rendezvous", "--port", "0"],
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.environment = {
            "NNODES": "1:2", "NPROC": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": rendezvous_port(self.rendezvous),
            "NODE_RANK": "1", "NODE_TIMEOUT": str(node_timeout), "JOIN_AFTER": "0",
            "OMP_NUM_THREADS": "1", "PACE": "0.1",
        }  # fmt: skip

    def on(self, node: int) -> list[str]:
        """Return the words before a command that run it on a node."""
        return [] if self.network is None else self.network.on(HOSTS[node])

    def start(self, node: int) -> subprocess.Popen[bytes]:
        """Start the launcher of a node."""
        command: list[Any] = [*self.on(node), sys.executable, ROOT / "recipes", self.recipe]
        command += [f"--run.dir={self.directory}", *self.settings]
        place = {"NODE_ADDR": NODES[node]} if self.network is None else self.network.environment(HOSTS[node])
        environment = {**os.environ, **self.environment, **place}
        with self.log.open("a") as log:
            self.launchers.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        return self.launchers[-1]

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
            assert statuses == [0, 0], self.describe()
            return read_rows(self.directory / "metrics.jsonl")
        finally:
            self.rendezvous.kill()
            self.rendezvous.wait()
            for launcher in self.launchers:
                if launcher.poll() is None:
                    kill_all(launcher.pid)
                    launcher.wait()

    def wait_for_step(self, step: int, *, since_restart: bool = False) -> None:
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while True:
            rows = read_rows(self.directory / "metrics.jsonl")
            restarted = not since_restart or any("restart_processes" in row for row in rows)
            if restarted and any(row["step"] >= step for row in rows):
                return
            alive = any(launcher.poll() is None for launcher in self.launchers)
            assert alive and time.monotonic() < deadline, self.describe()
            time.sleep(0.05)

    def describe(self) -> str:
        """Return the state of all processes and what they have printed."""
        ends, free = [each.poll() for each in self.launchers], shutil.disk_usage(self.log.parent).free
        return (
            f"statuses: rendezvous {self.rendezvous.poll()}, launchers {ends}; {free:,} bytes free on the disk\n"
            f"{self.log.read_text()[-6000:]}"
        )


def rendezvous_port(rendezvous: subprocess.Popen[str]) -> str:
    """Return the port at which `tools.rendezvous --port 0` listens; its output is a pipe."""
    assert rendezvous.stdout is not None
    said = rendezvous.stdout.readline()
    assert said.startswith("the rendezvous is at port "), f"tools.rendezvous did not listen: {said!r}"
    return said.split()[-1]


def run_undisturbed(folder: Path, *settings: str) -> tuple[Path, list[dict[str, Any]]]:
    """Write a recipe, run it on one process, and return the recipe and the rows of metrics; its data is prepared."""
    recipe = make_recipe(folder)
    (folder / "paced.py").write_text(PACED, encoding="utf-8")
    command: list[Any] = [sys.executable, ROOT / "recipes", recipe, f"--run.dir={folder / 'alone'}", *settings]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return recipe, read_rows(folder / "alone" / "metrics.jsonl")


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
    parser.add_argument("--namespaces", action="store_true", help="each node has a network of its own; needs root")
    arguments, more = parser.parse_known_args()
    if arguments.namespaces and (impossible := why_impossible()) is not None:
        parser.error(impossible)
    rng = random.Random(arguments.seed)
    network = Network(f"nodes-{os.getpid()}") if arguments.namespaces else None
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as cleanup:
        if network is not None:
            cleanup.callback(network.remove)
            network.make()
        folder = Path(temporary)
        recipe, expected = run_undisturbed(folder, *SETTINGS)
        batches = sorted({row["global_batch_size"] for row in expected if "loss" in row})
        differences, steps, seconds = [], [], []
        for number in range(arguments.kills):
            directory, settings = folder / f"run-{number}", [*SETTINGS, *more]
            rows = ElasticRun(recipe, directory, settings, arguments.node_timeout, network).lose_a_node(rng)
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


if __name__ == "__main__":
    main()
