"""What a directory of checkpoints holds, and what is in one."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FORMAT = 1
"""Version of the layout of a checkpoint. A reader refuses what is newer than itself."""

ALONE_WARNING = "torch.distributed is disabled, unavailable or uninitialized"
_NAME = re.compile(r"step-(\d{8,})")


def complete_checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints in `directory`, oldest first."""
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if _NAME.fullmatch(path.name)), key=step_of)


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
    """Fill `tensors` in place from `checkpoint`, each rank with its own shards.

    Raises ValueError for files that are damaged or hold other tensors.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with single_process_is_fine():
            dcp.load(tensors, checkpoint_id=checkpoint, no_dist=no_dist)
    except (CheckpointException, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not no_dist:
            raise  # another process may be gone
        reason = next(iter(getattr(error, "failures", {}).values()), (error, None))[0]
        raise ValueError(f"{checkpoint} is damaged, or not of this model: {reason}") from error


def tensor_names(checkpoint: Path) -> set[str]:
    """Names of the tensors a checkpoint holds."""
    import torch.distributed.checkpoint as dcp

    return set(dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata)


def step_of(checkpoint: Path) -> int:
    """The step a checkpoint is named after; -1: it is named otherwise."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match.group(1)) if match else -1


@contextmanager
def single_process_is_fine() -> Iterator[None]:
    """Without a process group DCP warns that it assumes one process, also when it is told so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=ALONE_WARNING)
        yield
