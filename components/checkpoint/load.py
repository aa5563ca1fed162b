"""Listing checkpoints and loading their state and tensors."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.distributed.collectives import run_on_main
from components.json_files import read_object

if TYPE_CHECKING:
    from torch.distributed.checkpoint.api import CheckpointException

    from components.checkpoint.tensor_index import TensorIndex

FORMAT = 3
"""Version of the checkpoint layout and of the names in its state.json and config.toml; others are refused."""

_NAME = re.compile(r"step-(\d{8,})")

# torch.distributed.checkpoint says so of each save and load of one process, also with `no_dist=True`
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class DamagedError(ValueError):
    """A checkpoint differs from what was saved; the message names the file and what is wrong with it."""


def list_checkpoints(directory: Path) -> list[Path]:
    """Return the complete checkpoints in `directory`, oldest first. Raises FileNotFoundError for a broken link."""
    if not directory.is_dir():
        if directory.is_symlink():  # such as to a disk that is not mounted: it may hold checkpoints
            raise FileNotFoundError(f"{directory} is a link to {directory.readlink()}, which does not exist")
        return []
    return sorted((path for path in directory.iterdir() if _NAME.fullmatch(path.name)), key=step_of)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return `state.json` of a checkpoint. Raises DamagedError if it is unreadable, ValueError for another format."""
    path = checkpoint / "state.json"
    try:
        state = read_object(path)
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedError(f"{checkpoint} is not a checkpoint: it has no state.json") from None
    except (ValueError, OSError) as error:
        raise DamagedError(f"{checkpoint} is damaged: state.json: {error}") from None
    if type(state.get("format")) is not int:
        raise DamagedError(f"{checkpoint} is damaged: state.json has no format number")
    if state["format"] != FORMAT:
        raise ValueError(
            f"{checkpoint} has format {state['format']} and this version reads format {FORMAT}; use the version of "
            "Powertrain that wrote it"
        )
    return state


def load_tensors(
    checkpoint: Path,
    tensors: dict[str, Any],
    *,
    no_dist: bool,
    index: TensorIndex | None = None,
    fetch: Callable[[set[str]], None] | None = None,
) -> None:
    """Fill `tensors` in place from `checkpoint`; each rank reads only its shards. Stored code is never executed.

    `index` is the result of `tensor_index`, if the caller has it already. `fetch` is called first, with the names of
    the files that this rank reads. Raises ValueError for files that are damaged or hold other tensors.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint._nested_dict import flatten_state_dict
    from torch.distributed.checkpoint.api import CheckpointException

    from components.checkpoint.safe_tensor_reader import UntrustedReader

    index = index or tensor_index(checkpoint, no_dist=no_dist)
    metadata = index.metadata(flatten_state_dict(tensors)[0])
    if fetch is not None:
        fetch({place.relative_path for place in metadata.storage_data.values()})
    reader = UntrustedReader(checkpoint, metadata)
    try:
        dcp.load(tensors, storage_reader=reader, no_dist=no_dist)
    except CheckpointException as error:
        raise ValueError(f"{checkpoint} is damaged, or belongs to another model: {root_cause(error)}") from error
    except RuntimeError as error:
        if not no_dist:
            raise  # not necessarily the files: another process may have died
        raise ValueError(f"{checkpoint} is damaged, or belongs to another model: {error}") from error


def tensor_index(checkpoint: Path, *, no_dist: bool) -> TensorIndex:
    """Return which tensors a checkpoint holds, and where. Raises ValueError for damaged metadata.

    The main process reads and checks it and sends it to all ranks; with `no_dist`, every process reads it itself.
    """
    from components.checkpoint.metadata_unpickler import read_index

    return read_index(checkpoint) if no_dist else run_on_main(lambda: read_index(checkpoint))


def root_cause(error: CheckpointException) -> BaseException:
    """Return the first of the errors that torch.distributed.checkpoint gathered from the ranks."""
    return next((failure for failure, _ in error.failures.values()), error)


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Return the step in the name of a checkpoint; -1 for a directory with another name."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match.group(1)) if match else -1


def is_kept_forever(checkpoint: Path, keep_every: int | None) -> bool:
    """Return whether `checkpoint.keep_every` keeps a checkpoint, also when it is not one of the last."""
    return keep_every is not None and step_of(checkpoint) % keep_every == 0


def old_checkpoints(checkpoints: list[Path], keep_last: int | None, keep_every: int | None) -> list[Path]:
    """Return those of `checkpoints`, oldest first, that `[checkpoint]` does not keep."""
    old = [] if keep_last is None else checkpoints[:-keep_last]
    return [checkpoint for checkpoint in old if not is_kept_forever(checkpoint, keep_every)]
