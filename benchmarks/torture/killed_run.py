"""A run that is killed at random instants and restarted, compared with an uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from components.checkpoint import list_checkpoints, load_tensors, verify
from components.checkpoint.metadata_unpickler import read_index
from recipes import cli

RECIPE = """
[run]
name = "torture"
cache_dir = "cache"
device = "cpu"
[model]
use = "models.llama:Llama"
size = "debug"
dim = 16
layers = 2
heads = 2
kv_heads = 1
head_dim = 8
ffn_dim = 32
[tokenizer]
use = "components.tokenizers:Bytes"
[data]
use = "components.data:TextFiles"
path = "text.txt"
[training]
total_tokens = 11_520           # 60 steps of 8 samples
sequence_length = 24
micro_batch_size = 2
precision = "float32"
[optimizer]
use = "components.optimizers:AdamW"
[lr_schedule]
use = "components.lr_schedules:WSD"
max_lr = 1e-2
warmup_tokens = 300
[batch]
use = "components.batch:Constant"
initial_size = 8
[checkpoint]
interval_steps = 3
keep_last = 2
[metrics.writers]
tensorboard = "none"
"""
TIMES = ("tokens_per_second", "step_seconds", "data_seconds", "mfu", "memory_bytes")
"""Metrics in which two equal runs may differ."""
INSTANTS = ("start", "any", "save", "metrics")
_TIMEOUT_SECONDS = 120.0
_ORPHAN_TIMEOUT_SECONDS = 10.0
"""Timeout of a process whose peer was killed: before they have connected, it would wait for half an hour."""


@dataclass(frozen=True)
class Kind:
    """The processes and the saves of a run."""

    ranks: int = 1
    async_save: bool = False

    def __str__(self) -> str:
        return f"{self.ranks} process{'es' if self.ranks > 1 else ''}, {'a' * self.async_save}synchronous saves"


@dataclass
class Tally:
    """The kills and the lives so far."""

    kills: Counter[str] = field(default_factory=Counter)
    lives: int = 0


def make_recipe(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text("It was the best of times, it was the worst of times. " * 40, encoding="utf-8")
    recipe = folder / "torture.toml"
    recipe.write_text(RECIPE, encoding="utf-8")
    return recipe


def run_life(recipe: Path, directory: Path, kind: Kind, kills: int, rng: random.Random, tally: Tally) -> None:
    """Kill a run in `directory` up to `kills` times, then let it finish. Raises AssertionError if it fails.

    Its processes are forked from this one, which has imported everything and computed nothing, so they start quickly.
    """
    for _ in range(kills):
        instant = rng.choice(INSTANTS)
        ended = _attempt(recipe, directory, kind, lambda i=instant: _wait_for(i, directory, rng), rng)  # type: ignore[misc]
        if ended is not None:
            assert ended == 0, f"status {ended}; see {directory}.log"
            break
        tally.kills[instant] += 1
    else:
        ended = _attempt(recipe, directory, kind, None, rng)
        assert ended == 0, f"status {ended}; see {directory}.log"
    tally.lives += 1


def compare(run: Path, uninterrupted: Path) -> None:
    """Raise AssertionError unless `run` is bitwise equal to `uninterrupted` and has the same files."""
    killed, reference = list_checkpoints(run / "checkpoints"), list_checkpoints(uninterrupted / "checkpoints")
    assert [path.name for path in killed] == [path.name for path in reference]
    for one, other in zip(killed, reference, strict=True):
        verify(one)
        first, second = _tensors(one), _tensors(other)
        assert first.keys() == second.keys()
        different = [name for name in first if not torch.equal(first[name], second[name])]
        assert not different, f"{one}: {different[:3]}"
        assert (one / "state.json").read_text() == (other / "state.json").read_text()
    assert list(_rows(run)) == list(_rows(uninterrupted)), "metrics.jsonl"
    names = [{str(path.relative_to(each)) for path in each.rglob("*")} for each in (run, uninterrupted)]
    assert names[0] == names[1], f"left behind: {sorted(names[0] ^ names[1])}"


def _attempt(
    recipe: Path, directory: Path, kind: Kind, until: Callable[[], None] | None, rng: random.Random
) -> int | None:
    """Start the run and kill it when `until` returns; return its exit status, or None if it was killed."""
    started = bool(list_checkpoints(directory / "checkpoints"))
    arguments = [str(recipe), f"--run.dir={directory}", f"--checkpoint.async_save={str(kind.async_save).lower()}"]
    arguments += ["--resume"] if started else ["--run.if_exists=replace"]
    environment = {"WORLD_SIZE": str(kind.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    if kind.ranks == 1:
        environment = {}
    children = [_fork(arguments, environment, rank, directory) for rank in range(kind.ranks)]
    if until is not None:
        until()
        # half of the time all are killed, as in the failure of a machine
        victims = children if rng.random() < 0.5 else [rng.choice(children)]
        for child in victims:
            os.kill(child, signal.SIGKILL)
    timeout = _TIMEOUT_SECONDS if until is None else _ORPHAN_TIMEOUT_SECONDS
    statuses = [_status(child, timeout) for child in children]
    if any(status < 0 for status in statuses):
        return None
    return max(statuses)


def _fork(arguments: list[str], environment: dict[str, str], rank: int, directory: Path) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        log = os.open(f"{directory}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(environment)
        if environment:
            os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank)})
        status = cli.main(arguments)
    finally:
        os._exit(status)


def _status(child: int, timeout: float) -> int:
    """Return the exit status, negative for a signal; after `timeout` seconds the child is killed."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _wait_for(instant: str, directory: Path, rng: random.Random) -> None:
    """Wait for an instant: while the run starts, at any time, during a save, or after a write of metrics."""
    if instant in ("start", "any"):
        time.sleep(rng.uniform(0, 0.4 if instant == "start" else 2.5))
        return
    metrics, deadline = directory / "metrics.jsonl", time.monotonic() + 2.5
    time.sleep(rng.uniform(0.2, 1.0))
    before = _size(metrics)
    while time.monotonic() < deadline:
        if instant == "metrics" and _size(metrics) > before:
            break
        if instant == "save" and any((directory / "checkpoints").glob(".*")):
            time.sleep(rng.uniform(0, 0.03))
            break
        time.sleep(0.0005)


def _tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint, unsharded, by name."""
    entries = read_index(checkpoint).entries
    tensors = {name: torch.empty(entry.shape, dtype=entry.dtype) for name, entry in entries.items() if entry.dtype}
    load_tensors(checkpoint, tensors, no_dist=True)
    return tensors


def _rows(run: Path) -> Iterator[dict]:
    for line in (run / "metrics.jsonl").read_text().splitlines():
        yield {key: value for key, value in json.loads(line).items() if key not in TIMES}


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def free_port() -> int:
    """Return a port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
