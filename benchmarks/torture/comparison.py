"""Comparison of a killed run with an uninterrupted one: checkpoints, metrics, writers, and the files left."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.torture.kinds import Kind
from components.checkpoint import list_checkpoints, load_tensors, verify
from components.checkpoint.metadata_unpickler import read_index
from components.metrics.jsonl import read_rows
from components.metrics.wandb_offline import read_records

TIMES = ("tokens_per_second", "step_seconds", "data_seconds", "mfu", "memory_bytes")
"""Metrics in which two equal runs may differ."""
COUNTS = ("step", "samples", "tokens", "global_batch_size", "epoch")
"""Metrics that are equal on every number of processes."""
LOSS_TOLERANCE = 1e-5
"""Largest relative difference of a loss between two numbers of processes."""
TENSOR_TOLERANCE = 1e-4
"""The same of a parameter or average, relative to the largest element of its tensor."""


@dataclass(frozen=True)
class Difference:
    """Largest relative differences of two runs; 0 if they are bitwise equal."""

    loss: float = 0.0
    tensor: float = 0.0
    """Of a parameter or an average of the parameters, relative to the largest element of its tensor."""


def compare(run: Path, uninterrupted: Path, kind: Kind, remote: Path | None = None) -> Difference:
    """Return how far `run` differs from `uninterrupted`, and raise AssertionError if that is too far.

    A run with a fixed number of processes must be bitwise equal: the rows of metrics, and the state and tensors of the
    checkpoints. Otherwise the counts must be equal, and losses and tensors within the tolerances. In both cases writers
    must have each step once, and nothing else may be left in the directory, nor in that of `remote`.
    """
    rows, expected = (list(_rows(each)) for each in (run, uninterrupted))
    difference = Difference()
    if kind.is_elastic:
        difference = Difference(
            _loss_difference(rows, expected), _compare_checkpoints(run, uninterrupted, ("model.", "average."))
        )
        assert difference.loss <= LOSS_TOLERANCE and difference.tensor <= TENSOR_TOLERANCE, str(difference)
    else:
        assert rows == expected, "metrics.jsonl"
        assert _compare_checkpoints(run, uninterrupted) == 0, f"{run}: tensors"
    if (run / "tensorboard").exists():
        assert tensorboard_curve(run) == _single(rows), "TensorBoard"
    if (run / "wandb").exists():
        losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
        assert wandb_curve(run) == losses, "W&B"
    _compare_names(run, uninterrupted)
    if remote is not None:
        local = [path.name for path in list_checkpoints(run / "checkpoints")]
        uploaded = list_checkpoints(remote / "checkpoints")
        assert uploaded and uploaded[-1].name == local[-1], f"remote checkpoints {uploaded}"
        for path in uploaded:
            verify(path)
    return difference


def _compare_checkpoints(run: Path, uninterrupted: Path, prefixes: tuple[str, ...] = ("",)) -> float:
    """Return the largest relative difference of a tensor in the checkpoints of equal steps, of which the last is one.

    Names of tensors begin with one of `prefixes`. A run that was stopped has saved at other steps too. Raises
    AssertionError if a checkpoint is damaged, if other checkpoints are kept, or if the clocks, or for equal tensors any
    other state, differ.
    """
    found, expected = (
        {path.name: path for path in list_checkpoints(each / "checkpoints")} for each in (run, uninterrupted)
    )
    assert max(found) == max(expected) and len(found) == len(expected), f"{sorted(found)}, {sorted(expected)}"
    for path in found.values():
        verify(path)
    difference = 0.0
    for name in found.keys() & expected.keys():
        state, other = (json.loads((each[name] / "state.json").read_text()) for each in (found, expected))
        first, second = _tensors(found[name]), _tensors(expected[name])
        assert first.keys() == second.keys()
        largest = max(_relative_difference(first[each], second[each]) for each in first if each.startswith(prefixes))
        assert state["clock"] == other["clock"] and (state == other or largest > 0), f"{found[name]}: state.json"
        difference = max(difference, largest)
    return difference


def _relative_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    if torch.equal(one, other):
        return 0.0
    one, other = one.double(), other.double()
    return float((one - other).abs().max() / other.abs().max())


def tensorboard_curve(run: Path) -> list[tuple[int, float]]:
    """Return (step, loss) as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of steps that a resumed run hides
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


def wandb_curve(run: Path) -> list[tuple[int, float]]:
    """Return (step, loss) of all offline files of W&B, in their order."""
    from wandb.proto.wandb_internal_pb2 import Record

    curve = []
    for file in sorted(run.glob("wandb/offline-run-*/run-*.wandb")):
        for data in read_records(file.read_bytes()):
            history = Record.FromString(data).history
            items = {item.key or "/".join(item.nested_key): item.value_json for item in history.item}
            if "train/loss" in items:
                curve.append((history.step.num, json.loads(items["train/loss"])))
    return curve


def _single(rows: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """Return (step, loss) with losses rounded to single precision, which TensorBoard keeps."""
    return [(row["step"], torch.tensor(row["loss"]).item()) for row in rows if "loss" in row]


def _loss_difference(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> float:
    """Return the largest relative difference of a training or validation loss, and check the counts."""
    for key in COUNTS:
        assert [row.get(key) for row in rows] == [row.get(key) for row in expected], key
    losses = [
        (row[key], other[key])
        for row, other in zip(rows, expected, strict=True)
        for key in other
        if key == "loss" or key.startswith("val_loss")
    ]
    return max(abs(one / other - 1) for one, other in losses)


def _compare_names(run: Path, uninterrupted: Path) -> None:
    """Raise AssertionError if a run left files that the other does not have, except in the folders of writers."""
    names = [
        {str(path.relative_to(each)) for path in each.rglob("*") if not _may_differ(path.relative_to(each))}
        for each in (run, uninterrupted)
    ]
    assert names[0] == names[1], f"left behind: {sorted(names[0] ^ names[1])}"


def _may_differ(path: Path) -> bool:
    """Return whether the name depends on when the run was stopped, or on the number of its processes."""
    return path.parts[0] in ("tensorboard", "wandb") or (len(path.parts) > 1 and path.parts[1].startswith("step-"))


def _tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint, unsharded, by name; of the random states, that of the first process."""
    entries = read_index(checkpoint).entries.items()
    tensors = {
        name: torch.empty(entry.shape, dtype=entry.dtype)
        for name, entry in entries
        if entry.dtype and not re.match(r"random\.[1-9]", name)
    }
    load_tensors(checkpoint, tensors, no_dist=True)
    return tensors


def _rows(run: Path) -> Iterator[dict[str, Any]]:
    for row in read_rows(run / "metrics.jsonl"):
        yield {key: value for key, value in row.items() if key not in TIMES}
