"""Disturb the network or the shared directory of an elastic run, and compare the run with an undisturbed one.

    python -m benchmarks.torture.networks [CASE ...] [--node-timeout 10]

Two nodes of one process each, in network namespaces of this machine, train with an adaptive batch; the node on host "a"
listens. Every case must end with the steps, samples and batches of an undisturbed run of one process, and its losses
within 1e-5; nodes that end must say why. Needs root on Linux; refused elsewhere.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.shared import machine, repeat_with
from benchmarks.torture.network_run import Launcher, NetworkRun
from benchmarks.torture.nodes import SETTINGS, kill_all, largest_difference, run_undisturbed
from benchmarks.torture.shared_directory import (
    PRIVILEGED,
    UNPRIVILEGED,
    fill,
    make_read_only,
    make_writable,
    small_file_system,
)
from benchmarks.torture.virtual_network import HOSTS, Network, why_impossible
from benchmarks.torture.wrong_clock import environment_of_clock

_LENGTH = ["--training.total_tokens=9K"]
"""Twenty-nine steps."""


def unplugged(run: NetworkRun) -> str:
    """the cable of b is pulled out: no connection is closed, and b has no route any more"""
    launchers = run.start_both()
    run.network.unplug("b")
    return _cut_off(run, *launchers)


def cut_in_a_save(run: NetworkRun) -> str:
    """the link is cut while both nodes write a checkpoint"""
    run.network.link.delay = 0.05  # a save takes a few tenths of a second
    first, second = run.start_both()
    directory = run.directory / "checkpoints"
    run.wait(lambda: any(directory.glob(".writing-*")), "a save")
    run.network.cut()
    return _cut_off(run, first, second)


def cut_in_the_rendezvous(run: NetworkRun) -> str:
    """the link is cut when both nodes are connected and wait for more"""
    first, second = run.start("a"), run.start("b")
    run.wait_until_connected(second)
    time.sleep(1)  # it is a participant
    run.network.cut()
    return _cut_off(run, first, second)


def late(run: NetworkRun) -> str:
    """packets take 100 ms in each direction"""
    run.network.link.delay = 0.1
    return _to_the_end(run)


def lossy(run: NetworkRun) -> str:
    """5 % of the packets are lost in each direction"""
    run.network.link.loss = 0.05
    return _to_the_end(run)


def half_open_to_b(run: NetworkRun) -> str:
    """packets from a to b are lost, those from b to a arrive"""
    launchers = run.start_both()
    run.network.cut("a")
    return _cut_off(run, *launchers)


def half_open_to_a(run: NetworkRun) -> str:
    """packets from b to a are lost, those from a to b arrive"""
    launchers = run.start_both()
    run.network.cut("b")
    return _cut_off(run, *launchers)


def clock_behind(run: NetworkRun) -> str:
    """the clock of b is an hour behind; b is killed, and comes back"""
    return _wrong_clock(run, -3600)


def clock_ahead(run: NetworkRun) -> str:
    """the clock of b is an hour ahead; b is killed, and comes back"""
    return _wrong_clock(run, 3600)


def read_only_on_b(run: NetworkRun) -> str:
    """the run directory turns read-only on b, for two saves"""
    return _read_only(run, run.start_both(), 1)


def read_only_on_a(run: NetworkRun) -> str:
    """the run directory turns read-only on a, whose process logs, for two saves"""
    return _read_only(run, run.start_both(), 0)


def full_on_b(run: NetworkRun) -> str:
    """only blocks that b may not use are free on the file system of the run, for two saves"""
    disk = run.directory.parent / "disk"
    run.cleanup.enter_context(small_file_system(disk))
    run.directory = disk / "run"
    launchers = run.start("a", *PRIVILEGED), run.start("b", *UNPRIVILEGED)
    run.wait_for_step(4)
    filled = fill(disk)
    failed = _wait_for_failed_saves(run, launchers[0], "No space left on device", "b")
    filled.unlink()
    run.finish(*launchers)
    return failed


def dies_in_the_rendezvous(run: NetworkRun) -> str:
    """b loses its network and is killed when it has just connected"""
    first, second = run.start("a"), run.start("b")
    run.wait_until_connected(second)
    return _dies(run, first, second)


def dies_before_its_workers(run: NetworkRun) -> str:
    """b loses its network and is killed after the rendezvous, when the nodes start their workers"""
    first, second = run.start("a"), run.start("b")
    children = Path(f"/proc/{first.process.pid}/task/{first.process.pid}/children")
    run.wait(lambda: bool(children.read_text().split()), "the workers of a start")
    return _dies(run, first, second)


CASES: dict[str, Callable[[NetworkRun], str]] = {
    "unplugged": unplugged, "cut-in-save": cut_in_a_save, "cut-in-rendezvous": cut_in_the_rendezvous,
    "delay": late, "loss": lossy, "half-open-to-b": half_open_to_b, "half-open-to-a": half_open_to_a,
    "clock-behind": clock_behind, "clock-ahead": clock_ahead,
    "read-only-b": read_only_on_b, "read-only-a": read_only_on_a, "full-b": full_on_b,
    "dies-in-rendezvous": dies_in_the_rendezvous, "dies-before-workers": dies_before_its_workers,
}  # fmt: skip
"""Each disturbs a run, returns how it ended, and leaves it finished. Raises AssertionError if it ends differently."""


def run_undisturbed_briefly(folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    """Return a recipe, and the rows of metrics of its run on one process."""
    return run_undisturbed(folder, *SETTINGS, *_LENGTH)


@contextmanager
def run_on_a_network(recipe: Path, directory: Path, node_timeout: int) -> Iterator[NetworkRun]:
    """Give a run and its network, and remove what is left of both."""
    network = Network(str(os.getpid()))
    run = NetworkRun(recipe, directory, network, settings=[*SETTINGS, *_LENGTH], node_timeout=node_timeout)
    try:
        network.make()
        yield run
    finally:
        run.close()
        network.remove()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"any of {', '.join(CASES)} (default: all)")
    parser.add_argument("--node-timeout", type=int, default=10, help="seconds until a node is lost")
    arguments = parser.parse_args()
    if unknown := set(arguments.cases) - set(CASES):
        parser.error(f"unknown cases: {', '.join(sorted(unknown))}")
    if (reason := why_impossible()) is not None:
        print(reason, file=sys.stderr)
        return 2
    print(f"{machine()}; NODE_TIMEOUT={arguments.node_timeout}, a checkpoint every 3 steps\n", flush=True)
    print("| case | what happened | how it ended | steps trained again | seconds without progress |")
    print("|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        recipe, expected = run_undisturbed_briefly(folder)
        for name in arguments.cases or CASES:
            with run_on_a_network(recipe, folder / name, arguments.node_timeout) as run:
                ended = CASES[name](run)
                assert (difference := largest_difference(run.rows(), expected)) <= 1e-5, f"{name}: {difference}"
                restarts = run.restarts()
            steps = " + ".join(str(row["restart_lost_steps"]) for row in restarts) or "0"
            seconds = " + ".join(f"{row['restart_seconds']:.0f}" for row in restarts) or "0"
            print(f"| {name} | {CASES[name].__doc__} | {ended} | {steps} | {seconds} |", flush=True)
    print(repeat_with("benchmarks.torture.networks"))
    return 0


def _cut_off(run: NetworkRun, first: Launcher, second: Launcher) -> str:
    """Wait until b, whose packets are lost, has ended and a continues; repair the link, and let b join again."""
    cut_at, address = time.monotonic(), run.network.address("b")
    run.wait_for_end(second, 1, f"{address}, lost contact with the others")
    seconds = time.monotonic() - cut_at
    run.wait_for_more_steps(3)  # more than were in progress
    run.check_checkpoints()
    if run.restarts():
        assert f"lost contact with {address}" in first.said(), first.said()
    run.network.restore()
    run.take_in_again(first, "b")
    assert first.said().count("joined; nodes of the run: 2") == 1, first.said()
    return f"b ended after {seconds:.0f} s; a continued; b joined"


def _to_the_end(run: NetworkRun) -> str:
    started = time.monotonic()
    run.finish(run.start("a"), run.start("b"))
    return f"like the undisturbed run, {time.monotonic() - started:.0f} s after the start"


def _wrong_clock(run: NetworkRun, seconds: int) -> str:
    clock = environment_of_clock(seconds, run.directory.parent)
    first, second = run.start("a"), run.start("b", **clock)
    run.wait_for_step(4)
    assert "2 x cpu" in first.said(), first.said()
    kill_all(second.process.pid)
    run.wait_for_more_steps(3)
    run.take_in_again(first, "b", **clock)
    return "both nodes started; a continued alone; b joined"


def _read_only(run: NetworkRun, launchers: tuple[Launcher, Launcher], index: int) -> str:
    process = launchers[index].process.pid
    make_read_only(run.directory, process)
    failed = _wait_for_failed_saves(run, launchers[0], "Read-only file system", HOSTS[index])
    make_writable(run.directory, process)
    run.finish(*launchers)
    return failed


def _wait_for_failed_saves(run: NetworkRun, main: Launcher, error: str, host: str) -> str:
    """Wait until two saves have failed, which the process that logs must report with the error and the node."""

    def failed() -> list[str]:
        return [line for line in main.said().splitlines() if "could not be saved" in line]

    run.wait(lambda: len(failed()) == 2, "two saves that fail")
    for line in failed():
        assert error in line, line
        assert host == main.host or run.network.address(host) in line, line
    named = "on a itself" if host == main.host else f"that names {host}"
    return f"2 saves failed with a message {named}; training continued; later saves succeeded"


def _dies(run: NetworkRun, first: Launcher, second: Launcher) -> str:
    run.network.cut()
    kill_all(second.process.pid)
    died_at = time.monotonic()
    run.wait_for_step(1)
    seconds = time.monotonic() - died_at
    run.network.restore()
    run.take_in_again(first, "b")
    return f"a took its first step after {seconds:.0f} s; b joined"


if __name__ == "__main__":
    sys.exit(main())
