"""What a directory of checkpoints holds, and what is in one."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.distributed.collectives import run_on_main

if TYPE_CHECKING:
    from torch.distributed.checkpoint.api import CheckpointException

    from components.checkpoint.tensor_index import TensorIndex

FORMAT = 2
"""Version of the layout of a checkpoint. A reader refuses what is newer than itself. 2 has a manifest."""

NO_DIST_WARNING = "torch.distributed is disabled, unavailable or uninitialized"
_LARGEST_STATE = 2**26
_NAME = re.compile(r"step-(\d{8,})")


class DamagedError(ValueError):
    """A checkpoint is not what was saved; the message names the file and what is wrong with it."""


def list_checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints in `directory`, oldest first. Raises FileNotFoundError for a link to nothing."""
    if not directory.is_dir():
        if directory.is_symlink():  # to a disk that is not mounted: nobody knows what it holds
            raise FileNotFoundError(f"{directory} is a link to {directory.readlink()}, which does not exist")
        return []
    return sorted((path for path in directory.iterdir() if _NAME.fullmatch(path.name)), key=step_of)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint. Raises DamagedError if it is none, ValueError if this code is too old."""
    path = checkpoint / "state.json"
    try:
        if (size := path.stat().st_size) > _LARGEST_STATE:
            raise ValueError(f"{size:,} bytes is no size for it")
        state = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedError(f"{checkpoint} is no checkpoint: it has no state.json") from None
    except (ValueError, OSError, RecursionError) as error:
        raise DamagedError(f"{checkpoint} is damaged: state.json: {error}") from None
    if not isinstance(state, dict) or type(state.get("format")) is not int:
        raise DamagedError(f"{checkpoint} is damaged: state.json names no format")
    if state["format"] > FORMAT:
        raise ValueError(
            f"{checkpoint} has format {state['format']}; this version reads up to {FORMAT}: update Powertrain"
        )
    return state


def load_tensors(checkpoint: Path, tensors: dict[str, Any], *, no_dist: bool, index: TensorIndex | None = None) -> None:
    """Fill `tensors` in place from `checkpoint`, each rank with its own shards. Executes nothing that is stored there.

    `index` is what `tensor_index` gave, if that was called before. Raises ValueError for files that are damaged or hold
    other tensors.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint._nested_dict import flatten_state_dict
    from torch.distributed.checkpoint.api import CheckpointException

    from components.checkpoint.safe_reader import UntrustedReader

    index = index or tensor_index(checkpoint, no_dist=no_dist)
    reader = UntrustedReader(checkpoint, index.metadata(flatten_state_dict(tensors)[0]))
    try:
        with silence_no_dist_warning():
            dcp.load(tensors, storage_reader=reader, no_dist=no_dist)
    except CheckpointException as error:
        raise ValueError(f"{checkpoint} is damaged, or not of this model: {root_cause(error)}") from error
    except RuntimeError as error:
        if not no_dist:
            raise  # another process may be gone
        raise ValueError(f"{checkpoint} is damaged, or not of this model: {error}") from error


def tensor_index(checkpoint: Path, *, no_dist: bool) -> TensorIndex:
    """Which tensors a checkpoint holds, and where. Raises ValueError for damaged metadata.

    The first process reads and checks it for all; with `no_dist` each does for itself.
    """
    from components.checkpoint.metadata import read_index

    return read_index(checkpoint) if no_dist else run_on_main(lambda: read_index(checkpoint))


def tensor_names(checkpoint: Path) -> set[str]:
    """Names of the tensors a checkpoint holds, read by this process. Raises ValueError for damaged metadata."""
    return set(tensor_index(checkpoint, no_dist=True).entries)


def root_cause(error: CheckpointException) -> BaseException:
    """What one process met, of what torch.distributed.checkpoint gathered of all, with their tracebacks."""
    return next((failure for failure, _ in error.failures.values()), error)


def step_of(checkpoint: Path) -> int:
    """The step a checkpoint is named after; -1: it is named otherwise."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match.group(1)) if match else -1


@contextmanager
def silence_no_dist_warning() -> Iterator[None]:
    """Without a process group DCP warns that it assumes one process, also when it is told so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=NO_DIST_WARNING)
        yield
