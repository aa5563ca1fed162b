"""Checkpoints: a complete directory or nothing, written by torch.distributed.checkpoint.

    checkpoints/step-00000123/
        *.distcp, .metadata     tensors, resharded on load to whatever the new run looks like
        state.json              clock, batch policy: everything that is no tensor
        config.toml             the configuration that made it

A checkpoint is written aside (`.writing-step-00000123`), synced to the disk and renamed. A directory that bears its
final name is therefore complete, and an interrupted save leaves only a name that no one reads.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from components.quantities import PositiveCount

FORMAT = 1
"""Version of the layout above. A reader refuses what is newer than itself."""

_NAME = re.compile(r"step-(\d{8,})")
_ASIDE = ".writing-"


class Ranks(Protocol):
    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def is_main(self) -> bool: ...
    def barrier(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """[checkpoint]: when to save, and what to keep. A run always saves when it ends or is stopped."""

    interval_steps: PositiveCount | None = None
    """Optimizer steps between saves; unset: only at the end."""
    keep_last: PositiveCount | None = 3
    """How many of the newest to keep; "none": all."""
    keep_every: PositiveCount | None = None
    """Checkpoints whose step is a multiple of this are kept for good."""
    async_save: bool = False
    """Copy to the host and write while training goes on."""

    def build(self, directory: Path, world: Ranks) -> CheckpointStore:
        return CheckpointStore(directory, world, keep_last=self.keep_last, keep_every=self.keep_every)


class CheckpointStore:
    """Saves to, lists and loads from one directory of checkpoints."""

    def __init__(
        self, directory: Path, world: Ranks, *, keep_last: int | None = None, keep_every: int | None = None
    ) -> None:
        self.directory = directory
        self.world = world
        self.keep_last = keep_last
        self.keep_every = keep_every

    def complete(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return complete_checkpoints(self.directory)

    def newest(self) -> Path | None:
        return max(self.complete(), default=None, key=_step_of)

    def clean(self) -> None:
        """Remove what dead saves have left. Call once, before the first save."""
        if self.world.is_main and self.directory.is_dir():
            for leftover in self.directory.glob(f"{_ASIDE}*"):
                shutil.rmtree(leftover)

    def save(self, step: int, tensors: dict[str, Any], state: Mapping[str, Any], config: str) -> Path:
        """Write the checkpoint of `step` and remove those no longer wanted. Every rank calls it; returns its path.

        `tensors` is a nested dict of tensors and DTensors, `state` is JSON. A checkpoint of this step that is already
        there is replaced.
        """
        final = self.directory / f"step-{step:08d}"
        aside = self.directory / f"{_ASIDE}{final.name}"
        if self.world.is_main:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        self.world.barrier()
        with _single_process_is_fine():
            dcp.save(tensors, checkpoint_id=aside, no_dist=self.world.size == 1)
        if self.world.is_main:
            _write_synced(aside / "state.json", json.dumps({"format": FORMAT, **state}, indent=1))
            _write_synced(aside / "config.toml", config)
            _sync(aside)
            replaced = self.directory / f"{_ASIDE}replaced-{final.name}"
            if final.exists():
                final.rename(replaced)
            aside.rename(final)
            _sync(self.directory)
            shutil.rmtree(replaced, ignore_errors=True)
            self._prune()
        self.world.barrier()
        return final

    def _prune(self) -> None:
        if self.keep_last is None:
            return
        for old in self.complete()[: -self.keep_last]:
            if self.keep_every is None or _step_of(old) % self.keep_every:
                shutil.rmtree(old)


def complete_checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints in `directory`, oldest first."""
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if _NAME.fullmatch(path.name)), key=_step_of)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint. Raises ValueError when it is none, or newer than this code reads."""
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{checkpoint} is no checkpoint: it has no state.json") from None
    except ValueError as error:
        raise ValueError(f"{checkpoint / 'state.json'} is damaged: {error}") from None
    if not isinstance(state, dict) or not isinstance(state.get("format"), int):
        raise ValueError(f"{checkpoint / 'state.json'} is damaged: it names no format")
    if state["format"] > FORMAT:
        raise ValueError(
            f"{checkpoint} has format {state['format']}; this version reads up to {FORMAT}: update Powertrain"
        )
    return state


def load_tensors(checkpoint: Path, tensors: dict[str, Any], *, no_dist: bool) -> None:
    """Fill `tensors` in place from `checkpoint`, each rank with its own shards."""
    with _single_process_is_fine():
        dcp.load(tensors, checkpoint_id=checkpoint, no_dist=no_dist)


def tensor_names(checkpoint: Path) -> set[str]:
    """Names of the tensors a checkpoint holds."""
    return set(dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata)


class TrainingTensors:
    """The tensors of a run as one nested dict: model and optimizer by parameter name, and this rank's random state."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, world: Ranks) -> None:
        self.model = model
        self.optimizer = optimizer
        self.world = world

    def collect(self) -> dict[str, Any]:
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
            "random": {str(self.world.rank): _random_state()},
        }

    def restore(self, checkpoint: Path) -> None:
        """Load model, optimizer and, where the checkpoint has this rank's, the random state.

        On more ranks than the checkpoint was written by, the new ranks keep the random state the seed gave them.
        """
        tensors = self.collect()
        if not any(name.startswith(f"random.{self.world.rank}.") for name in tensor_names(checkpoint)):
            del tensors["random"]
        load_tensors(checkpoint, tensors, no_dist=self.world.size == 1)
        set_model_state_dict(self.model, tensors["model"])
        set_optimizer_state_dict(self.model, self.optimizer, tensors["optimizer"])
        if "random" in tensors:
            _restore_random_state(tensors["random"][str(self.world.rank)])


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: Mapping[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def _single_process_is_fine() -> Iterator[None]:
    """Without a process group DCP warns that it assumes one process, also when it is told so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _step_of(checkpoint: Path) -> int:
    match = _NAME.fullmatch(checkpoint.name)
    return int(match.group(1)) if match else -1


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    """Make the names in `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
